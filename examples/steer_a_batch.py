"""One batch, a different intervention in every row: attention knocked out, heads ablated, neurons amplified, nothing.

python examples/steer_a_batch.py
"""

from emocircuits import BoostRoute, Plan, ScaleHead, ScaleNeurons, embedded, patch
from emocircuits.loading import load_model

model, processor = load_model("embedded")
face = embedded.faces.face(101_901, "happy", 1.0)
event = "my friend said that the old house was sold."
inputs = processor(images=[face] * 4, text=[embedded.language.prompt(event)] * 4, return_tensors="pt")

layers, heads = range(6), range(8)
everywhere = [(layer, head) for layer in layers for head in heads]
plans = {
    "the model left alone": Plan(),
    "text may not look at the image": Plan(
        [BoostRoute(everywhere, to=["query", "last", "generated"], source="visual", by=0.0, reading="logit-add")]
    ),
    "layer 2 without its heads": Plan([ScaleHead([(2, head) for head in heads], by=0.0)]),
    "a few neurons, ten times as strong": Plan([ScaleNeurons({4: [1, 2, 3, 4]}, by=10.0)]),
}

with patch(model, Plan.per_row(list(plans.values()))):
    tokens = model.generate(**inputs, max_new_tokens=16, do_sample=False)

answers = processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
for name, answer in zip(plans, answers, strict=True):
    print(f"{name:38} {answer}")
