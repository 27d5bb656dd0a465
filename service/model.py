"""ModelService: what is served, with its limits and defaults."""

from __future__ import annotations

from diffusiongemma.v1 import model_pb2, model_pb2_grpc
from runtime.request import MAX_DENOISING_STEPS, MAX_STOP_STRING_LENGTH, MAX_STOP_STRINGS
from service.intake import Intake
from service.mapping import defaults_proto, duration_proto
from service.served import Served


class ModelServicer(model_pb2_grpc.ModelServiceServicer):
    """The methods of `diffusiongemma.v1.ModelService`; what they raise is told by the interceptor."""

    def __init__(self, intake: Intake) -> None:
        self._intake, self._model = intake, _model_proto(intake.served)

    async def GetModel(self, request: model_pb2.GetModelRequest, context: object) -> model_pb2.GetModelResponse:  # noqa: N802
        """Tells the served model."""
        with self._intake.enter():
            self._intake.served.check_model(request.model)
            return model_pb2.GetModelResponse(model=self._model)


def _model_proto(served: Served) -> model_pb2.Model:
    facts = served.facts
    return model_pb2.Model(
        name=facts.name,
        precision=served.precision,
        engine=served.engine,
        canvas_length=facts.canvas_length,
        vocabulary_size=facts.vocab_size,
        end_token_ids=served.defaults.end_token_ids,
        vision=facts.vision,
        default_options=defaults_proto(served.defaults, facts.max_position - facts.canvas_length),
        max_context_token_count=facts.max_position,
        max_denoising_step_count=MAX_DENOISING_STEPS,
        max_stop_sequence_count=MAX_STOP_STRINGS,
        max_stop_sequence_length=MAX_STOP_STRING_LENGTH,
        max_message_byte_count=served.max_message_bytes,
        min_draft_interval=duration_proto(served.min_draft_interval),
    )
