"""The analyses that measure one signal of every layer, of any model and any text."""

from __future__ import annotations

from . import inference_stages, layer_signals, prediction_neurons, stream_signals
from .analyze import on_any_text
from .layer_signals import measure

attention = on_any_text("attention", layer_signals.attention, measure)
cka = on_any_text("cka", stream_signals.cka, measure)
cosine = on_any_text("cosine", stream_signals.cosine, measure)
lens = on_any_text("lens", layer_signals.lens, measure)
neurons = on_any_text("neurons", prediction_neurons.neurons)
norms = on_any_text("norms", layer_signals.norms, measure)
similarity = on_any_text("similarity", layer_signals.similarity, measure)
stages = on_any_text("stages", inference_stages.stages)
stream = on_any_text("stream", stream_signals.stream, measure)
