"""`make hub`: a Hub to try push and download with, offline. What is uploaded is gone when it stops."""

import argparse
import threading
from pathlib import Path

from . import Hub


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.hub", description=__doc__)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--repo", action="append", default=[], metavar="OWNER/NAME=FOLDER", help="serve a folder")
    options = parser.parse_args()
    with Hub(port=options.port) as hub:
        for repo in options.repo:
            repo_id, folder = repo.split("=", 1)
            hub.add_repo(repo_id, Path(folder))
        print(f"export HF_ENDPOINT={hub.url} HF_TOKEN={hub.token} HF_HUB_DISABLE_XET=1 HF_HOME=$(mktemp -d)")
        for repo_id in hub.repos:
            print(f"dijiang convert {repo_id} --push {hub.user}/{repo_id.split('/')[1]}-dijiang")
        print(end="", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print("stopped")


if __name__ == "__main__":
    main()
