//! Time as the frame loop sees it, so that ten hours of frames are a test of seconds.

use std::fs::File;
use std::io::Read;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// The clocks of the frame loop.
pub trait Clock: Send + Sync {
    /// Nanoseconds from any fixed origin.
    fn now_ns(&self) -> u64;

    /// The same in whole microseconds.
    fn now_us(&self) -> u64 {
        self.now_ns() / 1000
    }

    /// Processor time that the process has used, in microseconds; 0 if that is not known.
    fn cpu_us(&self) -> u64;
}

/// The wall clock, Unix milliseconds; 0 if it stands before 1970.
pub fn unix_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |elapsed| elapsed.as_millis() as u64)
}

/// One moment by two clocks, for what must tell time that can be set from time that has passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moment {
    /// The wall clock, Unix milliseconds; `None` on a device that has none.
    pub wall_ms: Option<u64>,
    /// A clock that does not run backwards, in milliseconds, from the start of the agent.
    pub mono_ms: u64,
}

/// The clocks of this machine.
#[derive(Clone, Copy, Debug)]
pub struct SystemClock {
    started: Instant,
}

impl SystemClock {
    /// Clocks whose origin is now.
    pub fn new() -> Self {
        Self {
            started: Instant::now(),
        }
    }
}

impl Default for SystemClock {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock for SystemClock {
    fn now_ns(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    fn cpu_us(&self) -> u64 {
        cpu_us()
    }
}

/// Processor time of all threads of this process in microseconds, in steps of 10 ms; 0 where
/// `/proc` is missing. It allocates nothing.
pub fn cpu_us() -> u64 {
    // Its 52 fields and a name of 16 bytes are shorter than that.
    let mut stat = [0; 2048];
    File::open("/proc/self/stat")
        .and_then(|mut file| file.read(&mut stat))
        .ok()
        .and_then(|len| parse_stat(stat.get(..len)?))
        .unwrap_or(0)
}

/// Fields 14 and 15 of `/proc/PID/stat` (proc_pid_stat(5)): user and system time in ticks, of which
/// Linux shows programs 100 a second on every architecture.
fn parse_stat(stat: &[u8]) -> Option<u64> {
    // The second field is the program's name in brackets and may hold anything, brackets too.
    let name_end = stat.iter().rposition(|byte| *byte == b')')?;
    let rest = str::from_utf8(stat.get(name_end + 1..)?).ok()?;
    let mut fields = rest.split_ascii_whitespace().skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    Some((user + system) * 10_000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_processor_time_is_read_whatever_the_program_is_called() {
        let stat = b"7 (a) b (\xff) S 1 7 7 0 -1 4194560 100 0 0 0 250 75 0 0 20 0 1 0 1 2 3";
        assert_eq!(parse_stat(stat), Some(3_250_000));
        assert_eq!(parse_stat(b"7 (cut"), None);
        assert_eq!(parse_stat(b"7 (cut) S 1 2"), None);
    }

    #[test]
    fn work_takes_processor_time() {
        let clock = SystemClock::new();
        let before = clock.cpu_us();
        // Until the counter moves; a counter that never does would hang the test, so it is bounded.
        let mut x = 1u64;
        for _ in 0..2_000 {
            for i in 0..1_000_000u64 {
                x = std::hint::black_box(x.wrapping_mul(i | 1));
            }
            if clock.cpu_us() > before {
                return;
            }
        }
        panic!("no processor time after {} µs", clock.now_us());
    }
}
