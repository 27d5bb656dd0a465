"""Canvas readout: a canvas position's final state to its argmax, candidate, entropy and next self-conditioning."""
