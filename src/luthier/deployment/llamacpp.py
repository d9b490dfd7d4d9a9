"""llama.cpp in this process, through the ``xllamacpp`` binding, as the parity gate asks it.

The binding always serves HTTP as well. Here it does so on a socket in a folder that only this user can open, so nothing
listens on the network; llama.cpp's tokenizer is asked over it, as the binding has no call for that.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from luthier.deployment.unix_http import SocketConnection
from luthier.errors import UserError

_TOLD = 10_000
"""Likeliest tokens that are asked for: no more can have 1e-4 each, and the gate looks at those."""


_ALWAYS = 1e6
"""A bias on a logit that outweighs all others."""


def require_llamacpp() -> None:
    """Refuse what asks llama.cpp where its binding is not installed.

    Raises:
        UserError: it is not.
    """
    if importlib.util.find_spec("xllamacpp") is None:
        raise UserError(
            "GGUF files are held against llama.cpp itself, and its binding xllamacpp is not installed",
            remedy="pip install 'luthier[llamacpp]'",
        )


def multiplies_bfloat16() -> bool:
    """Whether this build of llama.cpp multiplies bfloat16 by the processor's own instructions (AVX512-BF16).

    Several answers at once are then written 1.3 times as fast in bfloat16 as in float16; else some percent slower.
    """
    import xllamacpp

    return "AVX512_BF16 = 1" in xllamacpp.get_system_info()


def unused_instructions() -> bool:
    """Whether the processor has AVX-512 and this build of llama.cpp leaves it unused."""
    import xllamacpp

    return "AVX512" in torch.backends.cpu.get_cpu_capability() and "AVX512" not in xllamacpp.get_system_info()


class LlamaCppRuntime:
    """A GGUF model in llama.cpp; a :class:`~luthier.deployment.runtimes.Runtime`.

    The key-value cache is in float32, attention is computed plainly and everything else is as in ``llama-server``.

    Args:
        file: the GGUF file.
        adapter: a GGUF adapter that is applied to it.
        context: longest text, in tokens.
        threads: of the computation; None: as many as torch uses. More than there are free cores cost far more than
            they give, as they wait for each other at every matrix.

    Raises:
        UserError: llama.cpp is not installed or does not load the file.
    """

    name = "llama.cpp"

    def __init__(
        self, file: str | Path, *, adapter: str | Path | None = None, context: int = 1024, threads: int | None = None
    ) -> None:
        require_llamacpp()
        import xllamacpp

        self._folder = Path(tempfile.mkdtemp(prefix="luthier-"))  # of this user alone (mode 0700)
        self._socket = self._folder / "llama.sock"
        params = xllamacpp.CommonParams()
        params.model.path = str(file)
        params.hostnames = [str(self._socket)]
        params.n_ctx, params.n_parallel, params.n_gpu_layers = context, 1, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads or torch.get_num_threads()
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.sampling.seed = 0
        params.warmup = params.fit_params = params.ui = params.endpoint_slots = False
        params.cache_ram_mib, params.verbosity, params.offline = 0, 0, True
        if adapter is not None:
            params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
        self._adapters = [] if adapter is None else [{"id": 0, "scale": 1.0}]
        try:
            self._server = xllamacpp.Server(params)
        except Exception as error:
            self.close()
            raise UserError(
                f"llama.cpp does not load the file: {error}",
                where=str(file),
                remedy="it was not made by this version of the exporter, or is broken: export it again",
            ) from None
        self._vocabulary = int(self._over_socket("/v1/models")["data"][0]["meta"]["n_vocab"])
        self._letter = self.tokens("a")[-1]

    def __enter__(self) -> LlamaCppRuntime:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End it, and remove its socket."""
        self.__dict__.pop("_server", None)
        shutil.rmtree(self._folder, ignore_errors=True)

    def tokens(self, text: str) -> list[int]:
        """See :class:`~luthier.deployment.runtimes.Runtime`."""
        asked = {"content": text, "add_special": False, "parse_special": True}
        return [int(token) for token in self._over_socket("/tokenize", asked)["tokens"]]

    def text(self, ids: Sequence[int]) -> str:
        """The text of tokens, by llama.cpp's tokenizer."""
        return str(self._over_socket("/detokenize", {"tokens": list(ids)})["content"])

    def log_probabilities(self, ids: Sequence[int]) -> torch.Tensor:
        """See :class:`~luthier.deployment.runtimes.Runtime`."""
        # llama.cpp tells nothing of a token that is part of a character. A bias chooses another one, and what is told
        # are the model's own probabilities, before any bias.
        told = self._complete(ids, 1, n_probs=_TOLD, logit_bias=[[self._letter, _ALWAYS]])
        (place,) = told["completion_probabilities"]
        tokens = [token for token in place["top_logprobs"] if token["logprob"] is not None]
        row = torch.full((self._vocabulary,), -torch.inf)
        row[[token["id"] for token in tokens]] = torch.tensor([token["logprob"] for token in tokens])
        return row

    def log_probability(self, ids: Sequence[int], token: int) -> float:
        """How likely one token is after others, of all tokens."""
        # Chosen by a bias; what is told is before any bias. Asking for one place is far faster than for all of them.
        told = self._complete(ids, 1, n_probs=1, logit_bias=[[token, _ALWAYS]])
        (place,) = told["completion_probabilities"]
        return float(place["logprob"])

    def greedy(self, ids: Sequence[int], max_new_tokens: int) -> list[int]:
        """See :class:`~luthier.deployment.runtimes.Runtime`."""
        told = self._complete(ids, max_new_tokens)
        answer = [int(token) for token in told["tokens"]]
        return answer[:-1] if told["stop_type"] == "eos" else answer

    def ends_at(self, token: int) -> bool:
        """Whether an answer ends at a token: it is made the likeliest one, and must be the last."""
        told = self._complete([token], 2, logit_bias=[[token, _ALWAYS]])
        return bool(told["stop_type"] == "eos") and len(told["tokens"]) == 1

    def _complete(self, ids: Sequence[int], count: int, **settings: Any) -> dict[str, Any]:
        """What llama.cpp tells of the likeliest continuation."""
        asked = {
            "prompt": list(ids),
            "n_predict": count,
            "temperature": 0,
            "cache_prompt": True,
            "return_tokens": True,
            "lora": self._adapters,
        }
        return self._over_socket("/completion", asked | settings)

    def _over_socket(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        connection = SocketConnection(self._socket)
        with contextlib.closing(connection):
            if body is None:
                connection.request("GET", path)
            else:
                connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            told: dict[str, Any] = json.loads(response.read())
        if response.status != 200:
            raise UserError(f"llama.cpp does not answer {path}: {told}", remedy="export the model again")
        return told
