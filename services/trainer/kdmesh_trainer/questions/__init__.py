"""Questions with known answers: read, asked of rollout servers, and graded."""
