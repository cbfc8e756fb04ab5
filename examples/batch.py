"""A ragged batch: prompts of different lengths, with two images, one or none, at several budgets.

python examples/batch.py
"""

from __future__ import annotations

import vtoken
from vtoken import tiny
from vtoken.tiny.scenes import make_scene


def main() -> None:
    model, processor = tiny.load("llava")
    scenes = [make_scene(seed, "test").image for seed in range(4)]
    prompts = [
        "user: <image>\nhow many objects are there? assistant:",
        "user: <image>\n<image>\nwhere is the red one? assistant:",
        "user: what is there? assistant:",
        "user: <image>\nis there a green square? assistant:",
    ]
    inputs = processor(images=scenes, text=prompts, padding=True, return_tensors="pt")

    config = vtoken.VTokenConfig("vtc_cls", budget=0.25, options={"layers": 2})
    vtoken.patch(model, config)
    for budget in (0.5, 16):
        # for a while; the patch above comes back after it
        with vtoken.applied(model, "hired", budget=budget):
            out = model.generate(**inputs, max_new_tokens=4, do_sample=False)
            print(
                f"hired {budget}:",
                processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True),
            )
            print([(v.row, v.tokens_in, v.tokens_out) for v in vtoken.report(model).visuals])
    out = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    print(
        "vtc_cls 0.25:",
        processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True),
    )
    print(vtoken.report(model))


if __name__ == "__main__":
    main()
