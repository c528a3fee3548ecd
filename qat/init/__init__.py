"""Where training starts from, beyond the scales that every quantizer finds for itself: `gptq` (weights) and `imatrix`
(scales)."""
