"""What a derivative costs, as ratios to the best that can be written by hand: python -m benchmarks

One file a claim; each compares, in one run and in turns,

* the limit: a handwritten autograd.Function with the analytic derivative of this one problem;
* functorch_inverse;
* what a competent user writes in an afternoon: a general Function around `vmap(jacrev(f))` and `torch.linalg.solve`;
* the libraries that are installed and can do it: TorchOpt, zuko, xitorch, JAX with optimistix (`pip install '.[bench]'`).

All of them get their values from the same g, and all of them are checked, values and gradients, against the closed form.
Who is not right is marked "wrong": what it costs is then no matter.
"""
