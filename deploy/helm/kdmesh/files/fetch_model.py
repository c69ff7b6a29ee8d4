"""Fetches MODEL at REVISION into TARGET, once for all pods that share the volume."""

import fcntl
import os
import sys
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download

model, revision, target = os.environ["MODEL"], os.environ["REVISION"], Path(os.environ["TARGET"])
complete = target / ".complete"
if complete.exists():  # and the hub is not asked
    sys.exit()
target.mkdir(parents=True, exist_ok=True)
with (target / ".lock").open("w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    if complete.exists():
        sys.exit()
    # snapshot_download calls it a success when the hub does not answer and the directory is there, so look oneself.
    found = HfApi().model_info(model, revision=revision)
    snapshot_download(model, revision=found.sha, local_dir=target)
    missing = [file.rfilename for file in found.siblings or () if not (target / file.rfilename).is_file()]
    if missing or not found.siblings:
        sys.exit(f"{model}: not fetched: {', '.join(missing) or 'the hub has no files of it'}")
    complete.touch()
