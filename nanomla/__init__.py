"""The modules behind the scripts: settings, checkpoints, formats, data, engine, kernels."""
