"""Running it: data, training, lottery tickets, statistics, a store of runs."""
