"""The parts that layers are made of and that are neither operator nor mixer: norms, rotation, the short convolution,
gates, projections, states, and how modules begin and keep float32."""
