"""Networks of the literature as graphs; nodes are sums before the activation.

A node's activation is folded into its outgoing arcs, so an arc reads `relu > layer`.
Every network knows the shape of its input, without the batch axis, which `show` reads.
"""

from dagjax.graph.zoo.densenet import dense_block as dense_block
from dagjax.graph.zoo.densenet import densenet as densenet
from dagjax.graph.zoo.inception import inception as inception
from dagjax.graph.zoo.inception import inception_module as inception_module
from dagjax.graph.zoo.layers import global_mean as global_mean
from dagjax.graph.zoo.mixer import mixer as mixer
from dagjax.graph.zoo.mobilenet import mobilenet as mobilenet
from dagjax.graph.zoo.plain import conv2 as conv2
from dagjax.graph.zoo.plain import conv4 as conv4
from dagjax.graph.zoo.plain import conv6 as conv6
from dagjax.graph.zoo.plain import lenet5 as lenet5
from dagjax.graph.zoo.plain import lenet_300_100 as lenet_300_100
from dagjax.graph.zoo.plain import mlp as mlp
from dagjax.graph.zoo.plain import vgg as vgg
from dagjax.graph.zoo.recurrent import lstm_unrolled as lstm_unrolled
from dagjax.graph.zoo.registry import NETS as NETS
from dagjax.graph.zoo.registry import by_name as by_name
from dagjax.graph.zoo.registry import takes_conv as takes_conv
from dagjax.graph.zoo.residual import bottleneck_resnet as bottleneck_resnet
from dagjax.graph.zoo.residual import resnet as resnet
from dagjax.graph.zoo.residual import resnet50 as resnet50
from dagjax.graph.zoo.residual import wide_resnet as wide_resnet
from dagjax.graph.zoo.transformer import gpt as gpt
from dagjax.graph.zoo.transformer import transformer_block as transformer_block
from dagjax.graph.zoo.transformer import vit as vit
from dagjax.graph.zoo.unet import unet as unet
from dagjax.graph.zoo.unet import unet_core as unet_core
