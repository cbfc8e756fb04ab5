"""ReKV compared with attention written out pair by pair, and with the model's own generate()."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import vtoken
from tests.streaming.common import frames_of, model_of, plain_inputs, processor_of
from tests.streaming.test_session import SHORT, Q, fed, logits_of, plain, session_of
from vtoken.streaming import ReKVMemory

NAME = "llava_onevision"


def rekv(name: str = NAME, max_bytes: int = 10**7, **options) -> vtoken.StreamSession:
    return session_of(name, memory="rekv", max_bytes=max_bytes, memory_options=options)


@pytest.mark.parametrize("name", [NAME, "llava_next_video", "video_llava", "llava"])
def test_everything_retrieved_is_full_attention(name):
    frames = frames_of(5)
    with fed(rekv(name), frames) as session:
        text, logits = plain(name, frames)
        assert session.ask(Q, **SHORT).text == text
        assert torch.allclose(logits_of(session), logits, atol=1e-4)
        answer = session.ask(Q, **SHORT)
        assert answer.frames_used == (0.0, 0.5, 1.0, 1.5, 2.0)
        assert answer.tokens == plain_inputs(name, frames, Q)["input_ids"].shape[1]
        assert torch.allclose(logits_of(session, t=1.0), plain(name, frames[:3])[1], atol=1e-4)


class Oracle:
    """Every query-key pair of the LLM on its own: the query rotated by the pair's distance, the key not at
    all.
    """

    def __init__(self, session: vtoken.StreamSession, n_local: int) -> None:
        self.decoder, self.n_local = session.adapter.decoder, n_local
        config = self.decoder.config
        self.groups = config.num_attention_heads // config.num_key_value_heads

    def heads(self, module, x: Tensor) -> Tensor:
        return module(x).view(len(x), -1, self.decoder.layers[0].self_attn.head_dim).transpose(0, 1)

    def turned(self, x: Tensor, by: Tensor) -> Tensor:
        """x (..., D) rotated by as many positions as `by` (...) says."""
        cos, sin = self.decoder.rotary_emb(x, by.reshape(1, -1))
        cos, sin = (t[0].view(*by.shape, -1) for t in (cos, sin))
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat([-b, a], -1) * sin

    def attend(self, q: Tensor, k: Tensor, v: Tensor, distance: Tensor, seen: Tensor) -> Tensor:
        """q (H, n, D), k and v (Hkv, m, D), distance and seen (n, m) -> (n, H * D)."""
        k, v = (t.repeat_interleave(self.groups, 0) for t in (k, v))
        pairs = self.turned(q[:, :, None].expand(-1, -1, k.shape[1], -1), distance.expand(len(q), -1, -1))
        logits = (pairs * k[:, None]).sum(-1) * q.shape[-1] ** -0.5
        return (logits.masked_fill(~seen, -torch.inf).softmax(-1) @ v).transpose(0, 1).flatten(1)

    @torch.no_grad()
    def layer(self, i: int, x: Tensor, rule) -> Tensor:
        """One layer of (n, d); `rule(i, q, k, v)` gives the attention's output (n, H * D)."""
        layer = self.decoder.layers[i]
        attention, normed = layer.self_attn, layer.input_layernorm(x)
        q, k, v = (self.heads(getattr(attention, f"{w}_proj"), normed) for w in "qkv")
        x = x + attention.o_proj(rule(i, q, k, v))
        return x + layer.mlp(layer.post_attention_layernorm(x))

    def read(self, x: Tensor, n_init: int) -> list[tuple[Tensor, Tensor]]:
        """Keys and values per layer of a stream (n, d) read with a sliding window and sinks."""
        made = []
        at = torch.arange(len(x))
        distance = at[:, None] - at[None]
        near, sink = distance < self.n_local, (at < n_init)[None]
        seen = (distance >= 0) & (near | sink)
        distance = torch.where(near, distance, self.n_local - 1).clamp(min=0)

        def rule(i: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            made.append((k, v))
            return self.attend(q, k, v, distance, seen)

        for i in range(len(self.decoder.layers)):
            x = self.layer(i, x, rule)
        return made

    def behind(
        self, x: Tensor, contexts: list[tuple[Tensor, Tensor]] | None, choose=None
    ) -> tuple[Tensor, list]:
        """(n, d) behind a context per layer, which `choose(i, q)` gives; hidden states and the contexts."""
        used = []

        def rule(i: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            old_k, old_v = choose(i, q) if contexts is None else contexts[i]
            used.append((old_k, old_v))
            n, m = old_k.shape[1], k.shape[1]
            distance = torch.arange(n, n + m)[:, None] - torch.arange(n + m)[None]
            k, v = torch.cat([old_k, k], 1), torch.cat([old_v, v], 1)
            return self.attend(q, k, v, distance.clamp(min=0), distance >= 0)

        for i in range(len(self.decoder.layers)):
            x = self.layer(i, x, rule)
        return x, used


def stream_of(frames) -> Tensor:
    """(n, d): the prompt's beginning and all frames, as the LLM reads them; and how many tokens the beginning
    has.
    """
    inputs, model = plain_inputs(NAME, frames, Q), model_of(NAME)
    ids = inputs["input_ids"][0]
    places = (ids == model.config.video_token_id).nonzero()[:, 0]
    with torch.no_grad():
        x = model.get_input_embeddings()(ids)
        x[places] = model.model.get_video_features(inputs["pixel_values_videos"]).pooler_output[0]
    return x, int(places[0]), int(places[-1])  # the last of them is the newline behind the video


@pytest.mark.parametrize("n_local", [4, 7, 9, 100])
def test_prefill_slides_over_a_window_and_keeps_the_sinks(n_local):
    """Window ends inside frames, at a frame's end, inside the sinks' span, and behind everything."""
    frames = frames_of(6)
    with fed(rekv(n_local=n_local), frames) as session:
        x, first, last = stream_of(frames)
        want = Oracle(session, n_local).read(x[:last], first)
        for b, block in enumerate(session.memory.view()):
            for i, pair in enumerate(want):
                part = torch.stack([t[:, first + 4 * b : first + 4 * b + 4] for t in pair])
                assert torch.allclose(block.kv[i], part, atol=2e-4), (b, i)
                assert torch.allclose(block.mean[i], part[0].mean(1), atol=2e-4)


@pytest.mark.parametrize(("topk", "chunk", "metric"), [(2, 1, "dot"), (3, 1, "cosine"), (4, 2, "dot")])
def test_limited_retrieval(topk, chunk, metric):
    """The answer's first logits, from contexts that the oracle chose for itself, layer by layer."""
    frames, model = frames_of(7), model_of(NAME)
    with fed(rekv(n_local=9, topk=topk, chunk=chunk, metric=metric), frames) as session:
        got = logits_of(session)[0, 0]
        answer = session.ask(Q, **SHORT)
    x, first, last = stream_of(frames)
    oracle = Oracle(session, 9)
    made, taken = oracle.read(x[:last], first), set()

    def choose(i: int, q: Tensor):
        k, v = made[i]
        query = q.mean(1).flatten()
        means = torch.stack(
            [k[:, first + 4 * b :][:, :4].mean(1).repeat_interleave(2, 0).flatten() for b in range(7)]
        )
        scores = (
            torch.nn.functional.cosine_similarity(means, query[None]) if metric == "cosine" else means @ query
        )
        groups = [list(range(g, min(g + chunk, 7))) for g in range(0, 7, chunk)]
        rank = sorted(groups, key=lambda g: -float(scores[g].mean()))
        frames_taken = sorted([b for g in rank for b in g][:topk])
        taken.update(frames_taken)
        columns = [*range(first), *(first + 4 * b + j for b in frames_taken for j in range(4))]
        return k[:, columns], v[:, columns]

    question = processor_of(NAME).tokenizer(Q, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
    with torch.no_grad():
        _, contexts = oracle.behind(model.get_input_embeddings()(question), None, choose)
        hidden, _ = oracle.behind(x[last:], contexts)
        want = model.lm_head(oracle.decoder.norm(hidden[-1]))
    assert torch.allclose(got, want, atol=5e-4)
    assert answer.frames_used == tuple(b / 2 for b in sorted(taken))
    assert answer.visual_tokens == 4 * topk + 1  # and the newline behind a video


def test_selection():
    session = rekv(topk=4, chunk=2)
    memory: ReKVMemory = session.memory
    query = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    means = torch.zeros(7, 2, 8)
    assert memory.select(query, means[:3]).tolist() == [0, 1, 2]
    summed = query.view(2, 2, 8).sum(1)
    means[6], means[3], means[0] = summed, 3 * summed, 0.1 * summed
    # the odd tail is a group of its own; the next fills up
    assert memory.select(query, means).tolist() == [0, 2, 3, 6]
    means[2] = -2.5 * summed  # now 1 > 1 / 4 > 1 / 20
    means[1] = -summed
    assert memory.select(query, means).tolist() == [2, 3, 4, 6]
    memory.chunk, memory.topk = 1, 2
    assert memory.select(query, means).tolist() == [3, 6]


def test_questions_leave_no_trace():
    frames = frames_of(6)
    asked, silent = rekv(n_local=9, topk=2), rekv(n_local=9, topk=2)
    first = [fed(rekv(n_local=9, topk=2), frames).ask(q, **SHORT) for q in (Q, "what ?")]
    for i, frame in enumerate(frames):
        asked.push(frame, i / 2)
        asked.ask(Q, max_new_tokens=2)
        silent.push(frame, i / 2)
    for a, b in zip(asked.memory.view(), silent.memory.view(), strict=True):
        assert torch.equal(a.kv, b.kv)
    again = [asked.ask(q, **SHORT) for q in (Q, "what ?", Q)]
    assert [(a.text, a.frames_used) for a in again[:2]] == [(a.text, a.frames_used) for a in first]
    assert again[2].text == again[0].text


def test_files_hold_what_memory_holds_and_none_is_left(tmp_path):
    frames = frames_of(6)
    with fed(rekv(n_local=9, topk=2, disk=tmp_path), frames) as session:
        other = fed(rekv(n_local=9, topk=2), frames)
        assert torch.equal(logits_of(session), logits_of(other))
        assert session.stats["bytes"] == other.stats["bytes"]
    assert not list(tmp_path.iterdir())


def test_bytes_are_bounded_and_what_stood_still_goes_first():
    frames = frames_of(40)
    frames[10:30] = frames[10]
    small = fed(rekv(n_local=9), frames[:3])
    room = small.stats["bytes"] + 12 * small.memory.blocks[0].nbytes
    session, most = rekv(n_local=9, max_bytes=room), 0
    for i, frame in enumerate(frames):
        session.push(frame, i / 2)
        most = max(most, session.stats["bytes"])
    assert most <= room
    assert session.stats["forgotten"] == 40 - session.stats["steps"] > 20
    still = [t for b in session.memory.view() for t in b.seconds if 5.5 <= t < 15]
    assert len(still) <= 2
    assert session.ask(Q, **SHORT).text
    with pytest.raises(ValueError, match="raise max_bytes or lower n_local"):
        fed(rekv(n_local=9, max_bytes=2000), frames[:3])

    with fed(rekv(), frames[:1]) as session:
        half = session.memory.blocks[0].step
        step = replace(half, features=torch.zeros(2, 32), kept=half.kept[:2])
        with pytest.raises(ValueError, match="needs blocks of one length, found 2 tokens after 4"):
            session.memory.prepare(step)


def test_pruned_frames_make_smaller_blocks():
    with fed(session_of(NAME, "uniform", 0.5, memory="rekv"), frames_of(4)) as session:
        assert {len(b.step.kept) for b in session.memory.view()} == {2}
        assert session.ask(Q, **SHORT).visual_tokens == 8


def test_what_rekv_cannot_serve_is_refused(tmp_path):
    make = functools.partial(session_of, memory="rekv")
    for name in ("qwen2_5_vl", "qwen3_vl"):
        with pytest.raises(ValueError, match="it needs one-dimensional positions"):
            make(name)
    with make("internvl") as session, pytest.raises(ValueError, match="InternVLProcessor writes some"):
        session.push(frames_of(1)[0])
    for options, match in (
        (dict(metric="l2"), "one of dot, cosine"),
        (dict(disk=tmp_path / "no"), "must be a directory"),
    ):
        with pytest.raises(ValueError, match=match):
            make(NAME, memory_options=options)
    with pytest.raises(ValueError, match=r"pass memory_options=\{'topk'"):
        make(NAME, max_tokens=5)
    after = "user : {question} {frames} assistant :"
    with make(NAME, prompt=after) as session:
        session.push(frames_of(1)[0])
        with pytest.raises(ValueError, match=r"use a prompt with \{frames\} first"):
            session.ask(Q)
