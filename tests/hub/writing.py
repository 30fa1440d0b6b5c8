"""Repositories, branches, tags, uploads and commits of the loopback Hub."""

from __future__ import annotations

import base64
import hashlib
import json
from typing import Any

import yaml

from .reading import front_matter
from .server import LFS_SUFFIXES, REPO, REVISION, Handler, Refusal, route
from .store import Blob, Repo

LICENSES = ("apache-2.0", "mit", "llama2", "cc-by-4.0", "other")


@route("POST", "/api/repos/create")
def create_repo(self: Handler) -> None:
    self.need_token()
    wish = json.loads(self.body)
    repo_id = f"{wish.get('organization') or self.hub.user}/{wish['name']}"
    url = f"{self.hub.url}/{repo_id}"
    if repo_id in self.hub.repos:
        self.answer_json({"error": "You already created this model repo", "url": url}, 409)
        return
    repo = self.hub.repos[repo_id] = Repo(repo_id, private=wish.get("visibility") == "private")
    repo.commit("main", "initial commit", {".gitattributes": Blob(b"*.safetensors filter=lfs\n", lfs=False)})
    self.answer_json({"url": url})


@route("POST", rf"/api/models/{REPO}/branch/(?P<branch>[^/]+)")
def create_branch(self: Handler, repo: str, branch: str) -> None:
    self.need_token()
    found = self.find(repo)
    if branch in found.branches:
        raise Refusal(409, "Reference already exists")
    start = json.loads(self.body or b"{}").get("startingPoint", "main")
    found.branches[branch] = self.find_commit(found, start).sha
    self.answer_json({})


@route("POST", rf"/api/models/{REPO}/tag/{REVISION}")
def create_tag(self: Handler, repo: str, revision: str) -> None:
    self.need_token()
    found, tag = self.find(repo), json.loads(self.body)["tag"]
    if tag in found.tags:
        raise Refusal(409, "Tag reference exists already")
    found.tags[tag] = self.find_commit(found, revision).sha
    self.answer_json({})


@route("POST", "/api/validate-yaml")
def validate_yaml(self: Handler) -> None:
    try:
        metadata = front_matter(json.loads(self.body)["content"].encode()) or {}
    except yaml.YAMLError as error:
        wrong = [str(error)]
    else:
        wrong = [message for message, bad in _mistakes(metadata) if bad]
    errors = [{"message": message} for message in wrong]
    self.answer_json({"errors": errors, "warnings": []}, 400 if errors else 200)


def _mistakes(card: dict[str, Any]) -> list[tuple[str, bool]]:
    """Of those that the Hub refuses."""
    language = card.get("language", [])
    languages = language if isinstance(language, list) else [language]
    results = [result for model in card.get("model-index", []) for result in model.get("results", [])]
    return [
        ('"license" must be one of [apache-2.0, mit, ...]', card.get("license", "mit") not in LICENSES),
        ('"language" must only contain lowercase characters', any(str(x) != str(x).lower() for x in languages)),
        ('"base_model_relation" must be one of [adapter, finetune, merge, quantized]',
         card.get("base_model_relation", "finetune") not in ("adapter", "finetune", "merge", "quantized")),
        ('"base_model" must be a model id', "/" not in card.get("base_model", "a/b")),
        ('"model-index[0].name" is required', not all(model.get("name") for model in card.get("model-index", []))),
        ('"model-index[0].results[0].task.type" is required', not all(r.get("task", {}).get("type") for r in results)),
        ('"model-index[0].results[0].dataset.type" is required',
         not all(r.get("dataset", {}).get("type") and r["dataset"].get("name") for r in results)),
        ('"model-index[0].results[0].metrics[0].value" is required',
         not all("value" in m and m.get("type") for r in results for m in r.get("metrics", [{}]))),
    ]  # fmt: skip


@route("POST", rf"/api/models/{REPO}/preupload/{REVISION}")
def preupload(self: Handler, repo: str, revision: str) -> None:
    self.need_token()
    files = self.find_commit(self.find(repo), revision).files
    ignored = files[".gitignore"].data.decode().split() if ".gitignore" in files else []
    modes = [
        {
            "path": file["path"],
            "uploadMode": "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular",
            "shouldIgnore": file["path"] in ignored,
            "oid": files[file["path"]].etag if file["path"] in files else None,
        }
        for file in json.loads(self.body)["files"]
    ]
    self.answer_json({"files": modes})


@route("POST", rf"/{REPO}\.git/info/lfs/objects/batch")
def lfs_batch(self: Handler, repo: str) -> None:
    self.need_token()
    self.find(repo)
    wish, objects = json.loads(self.body), []
    for wanted in wish["objects"]:
        oid, size = wanted["oid"], wanted["size"]
        answer: dict[str, Any] = {"oid": oid, "size": size}
        if oid not in self.hub.objects:  # without actions: the Hub has it
            upload: dict[str, Any] = {"href": f"{self.hub.url}/lfs/{oid}"}
            if size > self.hub.part_size and "multipart" in wish["transfers"]:
                count = -(-size // self.hub.part_size)
                parts = {f"{n:05d}": f"{self.hub.url}/lfs-part/{oid}/{n}" for n in range(1, count + 1)}
                upload = {
                    "href": f"{self.hub.url}/lfs-complete/{oid}",
                    "header": {"chunk_size": str(self.hub.part_size), **parts},
                }
            answer["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.url}/lfs-verify"}}
        objects.append(answer)
    self.answer_json({"transfer": "basic", "objects": objects})


def keep(self: Handler, oid: str, data: bytes) -> None:
    if hashlib.sha256(data).hexdigest() != oid:
        raise Refusal(400, "the content does not match its sha256")
    self.hub.objects[oid] = data


@route("PUT", "/lfs/(?P<oid>[0-9a-f]{64})")
def lfs_upload(self: Handler, oid: str) -> None:
    keep(self, oid, self.body)
    self.hub.bytes_received += len(self.body)
    self.answer(b"")


@route("PUT", "/lfs-part/(?P<oid>[0-9a-f]{64})/(?P<number>[0-9]+)")
def lfs_part(self: Handler, oid: str, number: str) -> None:
    self.hub.parts[oid, int(number)] = self.body
    self.hub.bytes_received += len(self.body)
    self.answer(b"", headers={"ETag": f'"{hashlib.md5(self.body).hexdigest()}"'})


@route("POST", "/lfs-complete/(?P<oid>[0-9a-f]{64})")
def lfs_complete(self: Handler, oid: str) -> None:
    data = b""
    for part in json.loads(self.body)["parts"]:
        content = self.hub.parts.pop((oid, part["partNumber"]))
        if part["etag"].strip('"') != hashlib.md5(content).hexdigest():
            raise Refusal(400, f"part {part['partNumber']} is not what was uploaded")
        data += content
    keep(self, oid, data)
    self.answer_json({"success": True})


@route("POST", "/lfs-verify")
def lfs_verify(self: Handler) -> None:
    wanted = json.loads(self.body)
    if len(self.hub.objects.get(wanted["oid"], b"")) != wanted["size"]:
        raise Refusal(404, "not uploaded")
    self.answer_json({})


@route("POST", rf"/api/models/{REPO}/commit/{REVISION}")
def commit(self: Handler, repo: str, revision: str) -> None:
    self.need_token()
    found = self.find(repo)
    head = self.find_commit(found, revision)
    message, files = "", dict(head.files)
    for line in map(json.loads, self.body.splitlines()):
        key, value = line["key"], line["value"]
        if key == "header":
            message = value["summary"]
            if value.get("parentCommit", head.sha) != head.sha:
                raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        elif key == "file":
            content = base64.b64decode(value["content"])
            self.hub.bytes_received += len(content)
            files[value["path"]] = Blob(content, lfs=False)
        elif key == "lfsFile":
            if value["oid"] not in self.hub.objects:
                raise Refusal(400, f"LFS object {value['oid']} was never uploaded")
            files[value["path"]] = Blob(self.hub.objects[value["oid"]], lfs=True)
        elif key == "deletedFile":
            if files.pop(value["path"], None) is None:
                raise Refusal(404, "A file with this name doesn't exist", code="EntryNotFound")
        else:
            raise Refusal(400, f"no such operation here: {key}")
    made = found.commit(revision, message, files)
    self.answer_json({"commitUrl": f"{self.hub.url}/{repo}/commit/{made.sha}", "commitOid": made.sha})
