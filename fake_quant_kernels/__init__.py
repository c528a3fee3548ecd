"""The arithmetic on plain tensors, one file per operation; imported as `qat.fake_quant_kernels`."""
