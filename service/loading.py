"""From a bundle on disk to what a server serves: prompts, engine, its thread, and a first generation to warm it up."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from runtime.bundle import Bundle
from runtime.engines.onnxruntime import OnnxRuntimeEngine, Options
from runtime.engines.protocol import Engine
from runtime.errors import BundleError, DgemmaError
from runtime.events import Event, Finished
from runtime.generation import Generation
from runtime.prompt import PromptBuilder
from runtime.request import GenerationRequest, SamplingOverrides
from runtime.runner import Runner
from runtime.scheduler import Limits
from runtime.vocabulary import Vocabulary
from service.served import Served
from service.transport import MAX_MESSAGE_BYTES

LOOK_EVERY = 1.0
"""Seconds between two looks whether the first generation hangs."""

LAST_CALL = 2.0
"""Seconds that a call of it has to return where it is given up."""


@dataclass(frozen=True)
class Settings:
    """What a server is told of its engine and its limits."""

    bundle: Path
    threads: int
    """Of the onnxruntime engine; 0: one a physical core."""
    max_active: int
    """Requests that share the engine."""
    max_waiting: int
    """Requests in the queue."""
    min_draft_interval: float
    """Seconds between two drafts at least, whatever a request asks for."""
    verify_checksums: bool = True
    """Whether the bundle's files are compared with its manifest first."""
    engine: str = "onnxruntime"
    """`onnxruntime` or `torch`."""
    device: str = "cuda"
    """Of the torch engine."""
    stall: float = math.inf
    """Seconds that a call of the first generation may take."""


def load(settings: Settings) -> Served:
    """Load a bundle and run one short generation, so that the first request finds everything allocated.

    Raises:
        BundleError: the bundle cannot be loaded, differs from its manifest, or its first generation fails.
    """
    bundle = Bundle(settings.bundle)
    if settings.verify_checksums:
        bundle.verify_checksums()
    manifest = bundle.manifest
    vocabulary = Vocabulary.load(bundle)
    prompts = PromptBuilder(bundle, vocabulary)
    engine, engine_name = _load_engine(bundle, settings)
    generations = partial(
        Generation,
        facts=manifest.model,
        defaults=manifest.generation,
        vocabulary=vocabulary,
        chunk=engine.pool.encode_chunk,
    )
    runner = Runner(
        engine,
        generations,
        limits=Limits(settings.max_active, settings.max_waiting),
        rebuild=lambda: _load_engine(bundle, settings)[0],
    )
    runner.start()
    served = Served(
        facts=manifest.model,
        defaults=manifest.generation,
        precision=manifest.precision,
        engine=engine_name,
        prompts=prompts,
        vocabulary=vocabulary,
        runner=runner,
        min_draft_interval=settings.min_draft_interval,
        max_message_bytes=MAX_MESSAGE_BYTES,
    )
    try:
        warm_up(served, settings.stall)
    except BaseException:
        runner.close(LAST_CALL)
        raise
    return served


def _load_engine(bundle: Bundle, settings: Settings) -> tuple[Engine, str]:
    """The engine, and what clients are told of it."""
    if settings.engine == "onnxruntime":
        options = Options(threads=settings.threads, canvas_slots=settings.max_active)
        return OnnxRuntimeEngine.load(bundle, options), "onnxruntime-cpu"
    try:
        # Imported here: a server of the other engine needs no PyTorch.
        from runtime.engines.torch.engine import TorchEngine
        from runtime.engines.torch.options import Options as TorchOptions
    except ImportError as error:
        raise BundleError(f"the torch engine needs PyTorch ({error}); install dgemma[torch]") from error
    engine = TorchEngine.load(bundle, TorchOptions.serving(settings.device, settings.max_active))
    engine.prepare()
    return engine, f"torch-{settings.device}"


class _Ending:
    """A sink that only waits for the end."""

    def __init__(self) -> None:
        self._ended = threading.Event()
        self._outcome: Event | DgemmaError | None = None

    def put(self, outcome: Event | DgemmaError) -> None:
        if isinstance(outcome, Finished | DgemmaError):
            self._outcome = outcome
            self._ended.set()

    def wants_draft(self) -> bool:
        return False

    def ready(self) -> bool:
        return True

    def caught_up(self) -> bool:
        return True

    def wait(self, seconds: float) -> Event | DgemmaError | None:
        """The end; None where it has not come in that time."""
        self._ended.wait(seconds)
        return self._outcome


def warm_up(served: Served, stall: float) -> None:
    """Two steps of one canvas: the first is without self-conditioning, the second with it.

    Raises:
        BundleError: they fail, or one of their calls has not returned within `stall` seconds.
    """
    prompt_ids = served.prompts.token_ids([served.defaults.bos_token_id])
    overrides = SamplingOverrides(seed=0, max_output_tokens=1, max_denoising_steps=2, stability_threshold=2)
    sampling = overrides.resolve(served.defaults, served.facts.canvas_length)
    ending = _Ending()
    served.runner.submit(GenerationRequest(served.facts.name, prompt_ids, sampling), ending)
    while (outcome := ending.wait(LOOK_EVERY)) is None:
        if served.runner.stalled_for > stall:
            raise BundleError(f"the first generation hangs: the engine has not returned from a call for {stall:g} s")
    if isinstance(outcome, DgemmaError):
        raise BundleError(f"the first generation failed: {outcome}") from outcome
