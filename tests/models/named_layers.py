"""Modules with layers of given paths, and the names of chosen targets."""

from torch import nn


def names(chosen):
    """The targets' names: paths, with a role in brackets for slices."""
    return [target.name for target in chosen]


def paths(chosen):
    """The paths of the targets' layers."""
    return [target.path for target in chosen]


def nested(*wanted):
    """A module with a Linear at each path."""
    root = nn.Module()
    for path in wanted:
        parent = root
        *parts, leaf = path.split(".")
        for part in parts:
            if part not in dict(parent.named_children()):
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(leaf, nn.Linear(2, 2))
    return root
