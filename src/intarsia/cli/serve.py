"""`intarsia serve`: a model behind OpenAI's HTTP interface."""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from intarsia.cli.options import Device, Dtype, Plugins, Weights
from intarsia.errors import ConfigError

if TYPE_CHECKING:
    from intarsia.data import Tokenizer
    from intarsia.data.chat import ChatTemplate
    from intarsia.data.published import Conduct
    from intarsia.model import InferenceModel

KEY = "INTARSIA_API_KEY"


def command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="The directory of a model, trained here or published, or of a training run; a repository in the "
            "cache; or a preset, with random weights, to try the interface.",
        ),
    ],
    host: Annotated[str, typer.Option(help="The address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any that is free.")] = 8000,
    name: Annotated[
        str | None, typer.Option(help="What requests call the model. By default MODEL's last part.")
    ] = None,
    sequences: Annotated[int, typer.Option(min=1, help="Texts that run together, at most.")] = 16,
    snapshots: Annotated[
        int, typer.Option(min=0, help="States that are kept for later texts, at most; 0 keeps none.")
    ] = 48,
    tokens: Annotated[
        int,
        typer.Option(
            min=16, help="Memory of layers that keep something of each token, in tokens of all texts."
        ),
    ] = 65536,
    step_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens that the model reads in one step, at most.")
    ] = 512,
    step_seconds: Annotated[
        float,
        typer.Option(
            min=0.001,
            help="What a step should take while texts are being continued: so much of prompts is read in it as fits.",
        ),
    ] = 0.5,
    draft: Annotated[
        str, typer.Option(help="What guesses ahead: `lookup`, the directory of a smaller model, or `none`.")
    ] = "lookup",
    max_open: Annotated[int, typer.Option(min=1, help="Open requests, at most; more get 429.")] = 256,
    max_open_per_client: Annotated[int, typer.Option(min=1, help="The same of one address.")] = 64,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds until an answer is cut off.")] = 600.0,
    key_file: Annotated[
        Path | None,
        typer.Option(help=f"A file with the API key that requests must bring; or the environment's {KEY}."),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "",
    weights: Weights = None,
    plugin: Plugins = None,
) -> None:
    """Serve a model behind OpenAI's HTTP interface, with a page to chat at `/`.

    Ctrl-C, or SIGTERM, lets the answers that have begun come to their end; a second one ends them at once.

    \b
    Examples:
      intarsia serve runs/kimi-linear-tiny
      intarsia serve Qwen3.5-0.8B --weights int8 --port 8080
      curl localhost:8000/v1/completions -H 'Content-Type: application/json' \\
        -d '{"model": "kimi-linear-tiny", "prompt": "def ", "max_tokens": 20}'
    """
    from intarsia.cli.output import note
    from intarsia.extras import require
    from intarsia.inference import DraftModel, Engine, EngineSettings, LookUp
    from intarsia.mixers.registry import use_plugins

    uvicorn = require("uvicorn", "serve")
    for library in ("fastapi", "prometheus_client"):
        require(library, "serve")
    from intarsia.inference.server.app import create_app
    from intarsia.inference.server.draining import DrainingServer
    from intarsia.inference.server.served import Limits, Served
    from intarsia.inference.worker import Worker

    limits = Limits(
        _key(key_file), open_requests=max_open, open_per_client=max_open_per_client, seconds=timeout
    )
    settings = EngineSettings(
        sequences=sequences, snapshots=snapshots, tokens=tokens, step_tokens=step_tokens,
        step_seconds=step_seconds, piece=step_tokens, prefix_cache=snapshots > 0, drafts=0 if draft == "none" else 4,
    )  # fmt: skip
    use_plugins(plugin)
    ready, tokenizer, conduct, template = _load(model, device, dtype, weights)
    drafts: LookUp | DraftModel | None = None
    if draft == "lookup":
        drafts = LookUp()
    elif draft != "none":
        drafts = DraftModel(_load(draft, device, dtype, weights)[0], sequences, tokens)
    engine = Engine(ready, settings, drafts)
    served = Served(name or Path(model).name, Worker(engine), tokenizer, template, conduct, limits)
    report = engine.report()
    note(
        f"{served.name}: {sequences} texts at once, {snapshots} snapshots and {tokens:,} tokens in "
        f"{report.state_bytes / 1e6:,.1f} MB of states and {report.page_bytes / 1e6:,.1f} MB of pages"
    )
    if limits.key is None:
        note(
            f"no API key: whoever reaches {host} may use it"
            + ("" if _is_loopback(host) else f", and that is not this machine alone. Set {KEY} or --key-file")
        )
    _allow_connections()
    config = uvicorn.Config(create_app(served), host=host, port=port, log_level="info", access_log=False)
    DrainingServer(config).run()


def _allow_connections() -> None:
    """As many open files as the system lets this process have: each client is one, and 1,024 are soon used up."""
    try:
        import resource
    except ImportError:  # not on Windows
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 1 << 16 if hard == resource.RLIM_INFINITY else min(hard, 1 << 16)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _load(
    target: str, device: str, dtype: str, weights: str | None
) -> tuple[InferenceModel, Tokenizer, Conduct, ChatTemplate | None]:
    """A model with its tokenizer and manners; a preset gets random weights and bytes as tokens."""
    from intarsia.cli.output import note
    from intarsia.cli.places import checked_dtype, find_device, load, model_place
    from intarsia.data.chat import chat_template_of
    from intarsia.model import presets

    if target not in presets.names():
        template = chat_template_of(model_place(target))
        return (*load(target, device, dtype, weights), template)
    import torch

    from intarsia.data.byte_tokenizer import ByteTokenizer
    from intarsia.data.published import Conduct
    from intarsia.model import InferenceModel, LanguageModel

    note(f"{target} is a preset: its weights are random, and so is what it says")
    tokenizer = ByteTokenizer()
    with torch.device(find_device(device)):
        made = LanguageModel(presets.get(target, vocab_size=tokenizer.vocab_size))
    made.init_weights(0)
    made = made.to(checked_dtype(dtype) or torch.float32)
    packing = {} if weights is None else {"weights": weights}
    separator = tokenizer.separator
    return InferenceModel(made, **packing), tokenizer, Conduct((separator,), frozenset([separator])), None  # type: ignore[arg-type]


def _key(file: Path | None) -> str | None:
    """The API key: of a file, or of the environment."""
    if file is None:
        return os.environ.get(KEY) or None
    try:
        found = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--key-file {file} cannot be read: {error}") from error
    if not found:
        raise ConfigError(f"--key-file {file} is empty: write the key into it")
    return found


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
