"""Bundle to events: prompt building, the diffusion loop, the scheduler, the K/V pool and the engines."""
