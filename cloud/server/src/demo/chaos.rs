//! Kills at random moments, to show that the loop survives them.

use std::time::{Duration, Instant};

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::processes::Process;

/// Kills processes at random moments.
pub struct Chaos {
    left: u32,
    next: Option<Instant>,
    rng: ChaCha8Rng,
    killed: Option<Instant>,
}

impl Chaos {
    /// So many kills, drawn from a seed.
    pub fn new(kills: u32, seed: u64) -> Self {
        Self {
            left: kills,
            next: None,
            rng: ChaCha8Rng::seed_from_u64(seed),
            killed: None,
        }
    }

    /// For a moment after a kill, what the server knows of the dead device is from before it.
    pub fn is_waiting_for_restart(&self) -> bool {
        self.killed
            .is_some_and(|killed| killed.elapsed() < Duration::from_secs(3))
    }

    /// Kills a process if the moment for it has come.
    pub fn disturb(&mut self, server: &Process, devices: &[Process]) {
        if self.left == 0 {
            return;
        }
        let now = Instant::now();
        let next = *self
            .next
            .get_or_insert_with(|| now + Duration::from_millis(500));
        if now < next {
            return;
        }
        let victim = self.rng.random_range(0..=devices.len());
        let victim = devices.get(victim).unwrap_or(server);
        eprintln!("chaos: killing {}", victim.name());
        victim.kill();
        self.left -= 1;
        self.killed = Some(now);
        self.next = Some(now + Duration::from_millis(self.rng.random_range(1000..6000)));
    }
}
