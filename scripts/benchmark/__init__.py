"""What scripts/bench and scripts/bench-layers measure, and how; read `work`, then `peers`, then `reach`."""
