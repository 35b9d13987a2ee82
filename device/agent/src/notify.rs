//! What systemd is told: that the agent is ready, that it stops, and that frames advance.
//!
//! The protocol (sd_notify(3)) is a datagram of `KEY=value` lines to the socket that the
//! environment names. The watchdog is fed only while the frame loop gets on, so that systemd
//! restarts an agent whose camera or engine hangs.

use std::env;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

/// Tells systemd, or nobody.
#[derive(Debug, Default)]
pub struct Notifier {
    socket: Option<(UnixDatagram, SocketAddr)>,
    watchdog: Option<Duration>,
}

impl Notifier {
    /// Tells nobody.
    pub fn none() -> Self {
        Self::default()
    }

    /// As the environment of the process says: `NOTIFY_SOCKET`, and `WATCHDOG_USEC` if
    /// `WATCHDOG_PID` is this process or not set. Without a socket it tells nobody.
    pub fn from_env() -> Self {
        let Ok(path) = env::var("NOTIFY_SOCKET") else {
            return Self::none();
        };
        let ours =
            env::var("WATCHDOG_PID").map_or(true, |pid| pid == std::process::id().to_string());
        let interval = env::var("WATCHDOG_USEC")
            .ok()
            .filter(|_| ours)
            .and_then(|text| text.parse().ok())
            .filter(|us| *us > 0)
            .map(Duration::from_micros);
        match Self::open(&path, interval) {
            Ok(notifier) => notifier,
            Err(error) => {
                tracing::warn!(%error, path, "systemd cannot be told anything");
                Self::none()
            }
        }
    }

    /// Tells the socket at `path`; `@` begins an abstract name. `watchdog` is how long it may hear
    /// nothing.
    pub fn open(path: &str, watchdog: Option<Duration>) -> io::Result<Self> {
        let address = match path.strip_prefix('@') {
            Some(name) => SocketAddr::from_abstract_name(name)?,
            None => SocketAddr::from_pathname(path)?,
        };
        Ok(Self {
            socket: Some((UnixDatagram::unbound()?, address)),
            watchdog,
        })
    }

    /// How often to ask [`Watchdog::feed`]: half of what systemd allows; `None` if it does not
    /// watch.
    pub fn interval(&self) -> Option<Duration> {
        self.watchdog.map(|longest| longest / 2)
    }

    /// Start-up is done.
    pub fn ready(&self) {
        self.send("READY=1");
    }

    /// The end has begun.
    pub fn stopping(&self) {
        self.send("STOPPING=1");
    }

    /// All is well.
    pub fn alive(&self) {
        self.send("WATCHDOG=1");
    }

    fn send(&self, message: &str) {
        if let Some((socket, address)) = &self.socket
            && let Err(error) = socket.send_to_addr(message.as_bytes(), address)
        {
            tracing::debug!(%error, message, "systemd did not take a message");
        }
    }
}

/// Whether the watchdog is fed: only if the frame loop has got on since the last time, or has
/// nothing to do and says so.
#[derive(Clone, Copy, Debug, Default)]
pub struct Watchdog {
    last: Option<u64>,
}

impl Watchdog {
    /// `beat` rises with every frame that is done and every answer of a source that it has
    /// nothing; `held` says that no frame may be taken.
    pub fn feed(&mut self, beat: u64, held: bool) -> bool {
        let moved = self.last != Some(beat);
        self.last = Some(beat);
        moved || held
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_arrive_at_a_path_and_at_an_abstract_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notify");
        let name = format!("flywheel-notify-test-{}", std::process::id());
        let abstract_address = SocketAddr::from_abstract_name(&name).unwrap();
        for (socket, address) in [
            (
                UnixDatagram::bind(&path).unwrap(),
                path.to_str().unwrap().to_owned(),
            ),
            (
                UnixDatagram::bind_addr(&abstract_address).unwrap(),
                format!("@{name}"),
            ),
        ] {
            let notifier = Notifier::open(&address, Some(Duration::from_secs(4))).unwrap();
            assert_eq!(notifier.interval(), Some(Duration::from_secs(2)));
            notifier.ready();
            notifier.alive();
            notifier.stopping();
            for want in ["READY=1", "WATCHDOG=1", "STOPPING=1"] {
                let mut bytes = [0; 64];
                let len = socket.recv(&mut bytes).unwrap();
                assert_eq!(&bytes[..len], want.as_bytes());
            }
        }
        // Nobody listens: no error reaches the agent.
        Notifier::open("@flywheel-nobody", None).unwrap().ready();
        Notifier::none().ready();
    }

    #[test]
    fn the_watchdog_is_fed_only_while_frames_advance() {
        let mut watchdog = Watchdog::default();
        assert!(watchdog.feed(0, false), "start-up has its own timeout");
        assert!(!watchdog.feed(0, false));
        assert!(watchdog.feed(1, false));
        assert!(!watchdog.feed(1, false));
        assert!(watchdog.feed(1, true));
    }
}
