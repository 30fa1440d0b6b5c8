"""A Hugging Face Hub on the loopback: for tests without a network, and to try the whole journey offline.

It speaks as much of the Hub's API as the unmodified `huggingface_hub` client needs to look up, download, create and
push model repositories, and `datasets` to stream data sets. Repositories live in memory and are gone when it stops.

- `store.py`: files, commits and repositories; git and LFS hashes as the Hub has them.
- `server.py`: the server, what it counts, and the failures that it can be told to have.
- `reading.py`: look-ups, trees, downloads with ETag and Range, which LFS files answer by a redirect to another host.
- `writing.py`: repositories, branches, tags, LFS uploads in one piece or many, commits.

It tells data sets from models by nothing but their addresses. It has no spaces, no pull requests and no Xet: the client
must run with HF_HUB_DISABLE_XET=1, or it would look for a Xet server to upload to.

    python -m tests.hub --port 8000 --repo owner/name=FOLDER
"""

from . import reading, writing  # noqa: F401  (they register their routes)
from .server import Fault, Hub

__all__ = ["Fault", "Hub"]
