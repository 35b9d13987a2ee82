//! systemd's watchdog in virtual time: a slow pace is no reason to restart the agent.

#[allow(dead_code, reason = "each test uses its part")]
mod virtual_time;

use flywheel_agent::notify::Watchdog;
use virtual_time::{Cost, Device, Setup, World};

/// Half of WatchdogSec=30, which is how often the agent asks.
const ASK_US: u64 = 15_000_000;

#[test]
fn a_frame_every_ten_minutes_keeps_the_watchdog_fed() {
    let mut device = Device::at(
        &Setup {
            frames: 5,
            bad_every: 0,
            waiting: 4,
            quota: 200_000,
            live: Cost {
                us: 8_000,
                stall_every: 0,
                stall_us: 0,
                fails_at: None,
                panics_at: None,
            },
            extra: "",
        },
        1.0 / 600.0,
    );
    let mut watchdog = Watchdog::default();
    let mut asked = 0;
    while device.turn() {
        if World::get(&device.world.now_us) >= asked * ASK_US {
            let held = device.shared.status().held;
            assert!(
                watchdog.feed(device.shared.beats(), held),
                "starved {} s after the start, at frame {}",
                asked * ASK_US / 1_000_000,
                device.frame()
            );
            asked += 1;
        }
    }
    assert_eq!(device.shared.metrics.seen.get(), 5);
    // Four waits of ten minutes.
    assert!(asked > 4 * 600 / 15, "asked {asked} times only");
}
