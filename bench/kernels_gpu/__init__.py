"""Kernel benchmarks: what interventions cost, and how the kernels stand against others and against the machine.

    python -m bench.kernels_gpu [--groups prefill decode ...] [--quick] [--resume] [--results FOLDER]
    python -m bench.kernels_gpu --device cpu --results /tmp/smoke      # the same code on tiny shapes, no figures

| module | idea |
|---|---|
| `shapes` | which problems are measured: layers of real models, by group |
| `inputs` | a problem's tensors |
| `contenders` | the ways to compute each problem |
| `oracle` | float64 answers on sampled rows; who is wrong is not timed |
| `timing` | device time with a cold L2, contenders in turn |
| `ratios` | percentiles, ratios with intervals |
| `ceilings` | what this machine can do at most |
| `machine` | where a number comes from |
| `record` | the JSON file: its form, written whole, merged part by part |
| `measure` | one case from inputs to record |
| `goals` | what the project promised, against what was measured |
| `report` | docs/gpu.md from bench/results |
| `sass` | machine-code statistics of a fused kernel, for goals that are missed |
"""
