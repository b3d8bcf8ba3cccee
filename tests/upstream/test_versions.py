"""What is installed says its version; what is used from its sources has none."""

import torch

from lorakit.upstream.versions import installed_version


def test_what_is_not_installed_has_no_version():
    assert installed_version("torch") == torch.__version__
    assert installed_version("no-such-library") is None
