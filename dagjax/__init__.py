"""dagjax: neural networks as directed acyclic graphs of functions."""

from dagjax.graph import zoo as zoo
from dagjax.graph.combine import GraphBuilder as GraphBuilder
from dagjax.graph.combine import block as block
from dagjax.graph.combine import concat as concat
from dagjax.graph.combine import parallel as parallel
from dagjax.graph.combine import product as product
from dagjax.graph.combine import residual as residual
from dagjax.graph.combine import series as series
from dagjax.graph.dag import DAG as DAG
from dagjax.graph.dag import gates as gates
from dagjax.graph.dag import init as init
from dagjax.graph.dag import inject as inject
from dagjax.graph.factors import compose as compose
from dagjax.graph.factors import elementary as elementary
from dagjax.graph.factors import factors as factors
from dagjax.graph.factors import inverse as inverse
from dagjax.graph.factors import parallel_sweep as parallel_sweep
from dagjax.graph.functions import flatten as flatten
from dagjax.graph.functions import identity as identity
from dagjax.graph.merges import Concat as Concat
from dagjax.graph.merges import Product as Product
from dagjax.graph.rewrite import delete as delete
from dagjax.graph.rewrite import insert as insert
from dagjax.graph.rewrite import node_functions as node_functions
from dagjax.graph.rewrite import subnetwork as subnetwork
from dagjax.graph.show import show as show
from dagjax.graph.topology import Arc as Arc
from dagjax.graph.topology import Graph as Graph
from dagjax.graph.topology import GraphError as GraphError
from dagjax.graph.topology import count_paths as count_paths
from dagjax.graph.topology import live_arcs as live_arcs
from dagjax.sparsity import masks as masks
from dagjax.sparsity import pruners as pruners
from dagjax.sparsity import scores as scores
from dagjax.sparsity import selection as selection

__version__ = "0.1.0"
