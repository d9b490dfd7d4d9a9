"""Pushing to a hub: what goes and what stays, over the wire to a server that speaks the hub's protocol, and back."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from luthier.deployment.hub import files_of, folder_of, push
from luthier.errors import UserError
from luthier.method_options import LoraMethod
from luthier.methods import get_method
from luthier.methods.saved import load_saved, write_record
from luthier.models.loading import load_model, load_tokenizer

COMMIT = "a" * 40


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's HTTP interface that one commit of small files, and reading them, takes."""

    repositories: dict[str, dict[str, bytes]]
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, content, status=200, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Authorization") != "Bearer good":
            return self.answer({"error": "unauthorised"}, 401)
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.repositories.setdefault(name, {})
            return self.answer({"url": f"http://{self.headers['Host']}/{name}", "id": name})
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        name = "/".join(self.path.split("/")[3:5])
        if "/preupload/" in self.path:
            files = [f | {"uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]]
            return self.answer({"files": [{k: f[k] for k in ("path", "uploadMode", "shouldIgnore")} for f in files]})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.repositories[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return self.answer(
            {"commitUrl": f"http://{self.headers['Host']}/{name}/commit/{COMMIT}", "commitOid": COMMIT, "success": True}
        )

    def do_GET(self):
        parts = self.path.split("?")[0].strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        name = "/".join(parts[2:4] if api else parts[:2])
        files = self.repositories.get(name)
        if files is None:
            return self.answer({"error": "no such repository"}, 404, X_Error_Code="RepoNotFound")
        if api and "tree" in parts:
            return self.answer([{"type": "file", "path": f, "size": len(c), "oid": "0"} for f, c in files.items()])
        if api:
            return self.answer({"id": name, "sha": COMMIT, "siblings": [{"rfilename": f} for f in files]})
        content = files.get("/".join(parts[4:]))
        if content is None:
            return self.answer({"error": "no such file"}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
        etag = f'"{hashlib.sha1(content).hexdigest()}"'
        return self.answer(content, X_Repo_Commit=COMMIT, ETag=etag)

    do_HEAD = do_GET


@pytest.fixture
def hub():
    """A hub on this machine: its address, and the files of its repositories."""
    handler = type("OneHub", (Hub,), {"repositories": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", handler.repositories
    server.shutdown()


@pytest.fixture
def run(terse_model_dir, tmp_path):
    """A run's folder, whose adapter's base is a folder of this machine."""
    folder = tmp_path / "run"
    adapter = folder / "adapter"
    tokenizer, model = load_tokenizer(terse_model_dir), load_model(terse_model_dir)
    model = get_method("lora").wrap(model, LoraMethod(), [])
    get_method("lora").save(model, adapter)
    tokenizer.save_pretrained(adapter)
    write_record(adapter, model, str(terse_model_dir))
    (adapter / "README.md").write_text("# A model card\n")
    for name in ("training_args.bin", "rejects.jsonl", ".secret.json", "optimizer.pt", "notes.json"):
        (adapter / name).write_text("{}")
    (folder / "checkpoints").mkdir()
    (folder / "manifest.json").write_text(json.dumps({"model": {"name": str(terse_model_dir)}}))
    (folder / "recipe.yaml").write_text("{}")
    return folder


def test_what_goes_and_what_stays(run, terse_model_dir):
    files = files_of(folder_of(run), "alice/base")
    assert set(files) == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "luthier_base.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "alice/base"
    assert not any(str(terse_model_dir).encode() in f for f in files.values() if isinstance(f, bytes))
    with pytest.raises(UserError, match="names a folder of this machine"):
        files_of(folder_of(run))
    (run / "adapter" / "README.md").write_text(f"it lies in {run / 'adapter'}")
    with pytest.raises(UserError, match=r"README\.md names a folder"):
        files_of(folder_of(run), "alice/base")


def test_the_embedded_models_origin_stands_for_its_folder(run, smollm2_dir):
    for name, key in (("adapter_config.json", "base_model_name_or_path"), ("luthier_base.json", "base")):
        path = run / "adapter" / name
        value = str(smollm2_dir) if name.startswith("adapter") else "smollm2"
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    files = files_of(folder_of(run))
    name = json.loads(files["adapter_config.json"])["base_model_name_or_path"]
    assert name == "HuggingFaceTB/SmolLM2-135M-Instruct"


SCRIPT = """
import sys
from luthier.deployment.hub import push
from luthier.errors import UserError
from luthier.methods.saved import load_saved
run, base = sys.argv[1:]
print(push(base, "alice/base"))
print(push(run, "alice/orders", base="alice/base"))
import torch
both = load_saved("alice/orders"), load_saved(run)
ids = torch.arange(5, 30)[None]
print(both[0].kind, both[0].base_name, torch.equal(*(s.model(ids).logits for s in both)))
"""


def test_to_the_hub_and_back(hub, run, terse_model_dir, tmp_path):
    address, repositories = hub
    environment = os.environ | {
        "HF_ENDPOINT": address,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": "good",
        "NO_PROXY": "127.0.0.1",
    }
    command = [sys.executable, "-c", SCRIPT, str(run), str(terse_model_dir)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "adapter alice/base True"
    assert set(repositories) == {"alice/base", "alice/orders"}
    assert "rejects.jsonl" not in repositories["alice/orders"] and "config.json" in repositories["alice/base"]
    done = subprocess.run(command, env=environment | {"HF_TOKEN": "bad"}, capture_output=True, text=True)
    assert "the hub does not let this token write there" in done.stderr
    gone = environment | {"HF_ENDPOINT": "http://127.0.0.1:9"}
    done = subprocess.run(command, env=gone, capture_output=True, text=True)
    assert "cannot be reached" in done.stderr.splitlines()[-3] + done.stderr.splitlines()[-1]


def test_mistakes(run, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    for repository in ("orders", "a/b/c", "alice/or ders", "../x"):
        with pytest.raises(UserError, match="no repository's name"):
            push(run, repository, base="alice/base")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(UserError, match="there is no token"):
        push(run, "alice/orders", base="alice/base")
    with pytest.raises(UserError, match="the run holds no merged"):
        folder_of(run, "merged")
    with pytest.raises(UserError, match="there is no folder"):
        folder_of(run / "nothing")
    with pytest.raises(UserError, match="no weights lie there"):
        folder_of(run / "checkpoints")
    with pytest.raises(UserError, match="goes with a run"):
        folder_of(run / "adapter", "adapter")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_saved("alice/nothing-of-that-name")
