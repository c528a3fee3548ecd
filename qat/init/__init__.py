"""Where training starts from, beyond the scales that every quantizer finds for itself: `gptq` and `blockwise`
(weights), `imatrix` (scales) and `file` (both, from a packed folder)."""
