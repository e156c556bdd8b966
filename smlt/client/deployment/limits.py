"""Lambda's limits on code: https://docs.aws.amazon.com/lambda/latest/dg/gettingstarted-limits.html"""

from __future__ import annotations

from collections.abc import Mapping

from smlt.errors import DeployError

MB = 1024 * 1024
#: A zip within the request itself; larger ones go through S3.
DIRECT_BYTES = 50 * MB
#: The package and all layers, unpacked.
UNPACKED_BYTES = 250 * MB


def check_unpacked(package: Mapping[str, int], layer: Mapping[str, int]) -> None:
    """DeployError when the files, names with their sizes in bytes, are more than Lambda unpacks."""
    total = sum(package.values()) + sum(layer.values())
    if total <= UNPACKED_BYTES:
        return
    folders: dict[str, int] = {}
    for where, files in (("", package), ("layer: ", layer)):
        for name, size in files.items():
            folder = f"{where}{name.removeprefix('python/').partition('/')[0]}"
            folders[folder] = folders.get(folder, 0) + size
    largest = sorted(folders, key=lambda folder: -folders[folder])[:4]
    raise DeployError(
        f"too large: {in_mb(total)} of {in_mb(UNPACKED_BYTES)} MB unpacked; the largest are "
        f"{', '.join(f'{folder} ({in_mb(folders[folder])} MB)' for folder in largest)}; "
        "build a container image: smlt layer dockerfile"
    )


def in_mb(size: int) -> str:
    """262144000 bytes as "250"."""
    return f"{size / MB:.0f}" if size >= 10 * MB else f"{size / MB:.1f}"


def size_text(size: int) -> str:
    """262144000 as "250 MB", 1536 as "1.5 kB"."""
    return f"{in_mb(size)} MB" if size >= MB / 10 else f"{size / 1024:.1f} kB"
