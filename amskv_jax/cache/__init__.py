"""How a plan is carried out: buffers and the loop over layers."""
