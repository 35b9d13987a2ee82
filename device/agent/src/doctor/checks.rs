//! The checks of what is on the device itself. Those that depend on a measured value judge it in a
//! function of its own, which is a function of that value alone.

use std::fs;
use std::path::Path;
use std::time::Instant;

use rustix::fs::statvfs;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::Check;
use crate::config::Config;
use crate::files;
use crate::identity::Identity;
use crate::models::{self, Loader};
use crate::source::{self, FrameBuf, Read};
use crate::state::State;

/// Bytes in a megabyte.
const MB: u64 = 1_000_000;
/// Room that the system, the state and model packages want besides the spool.
const BESIDES: u64 = 200 * MB;
/// Days before a certificate's end at which to renew it.
const RENEW_DAYS: i64 = 30;
/// Indices that are tried until a source gives a frame.
const TRIES: u64 = 20;

/// Whether the data folder can be written to.
pub fn folder(data: &Path) -> Check {
    let name = "data folder";
    let probe = data.join(".doctor");
    let tried = files::replace(&probe, b"probe").and_then(|()| fs::remove_file(&probe));
    match tried {
        Ok(()) => Check::ok(name, format!("{} is writable", data.display())),
        Err(error) => Check::fail(
            name,
            format!("{}: {error}", data.display()),
            "make the folder (enrolment does) and give it to the user that the agent runs as",
        ),
    }
}

/// Whether the spool fits the disk.
pub fn space(config: &Config) -> Check {
    match statvfs(&config.data) {
        Ok(disk) => room(
            disk.f_bavail.saturating_mul(disk.f_frsize),
            u64::from(config.spool.quota_mb) * MB,
        ),
        Err(error) => Check::warn(
            "disk space",
            format!("{}: {error}", config.data.display()),
            "mend the data folder first",
        ),
    }
}

/// Judges free bytes against the spool's quota, of which the files may take one and a half.
fn room(free: u64, quota: u64) -> Check {
    let name = "disk space";
    let need = quota + quota / 2 + BESIDES;
    let detail = format!(
        "{} MB free, the spool may grow to {} MB",
        free / MB,
        (quota + quota / 2) / MB
    );
    let mend = "free some space, or lower spool.quota_mb";
    if free >= need {
        Check::ok(name, detail)
    } else if free >= BESIDES / 4 {
        Check::warn(name, detail, mend)
    } else {
        Check::fail(name, detail, mend)
    }
}

/// Whether key and certificate belong together and are valid now.
pub fn identity(identity: &Identity, now_ms: u64) -> Check {
    let name = "identity";
    let enrol = "enrol the device again with `flywheel-agent enroll --force`";
    // rustls compares the key with the certificate.
    if let Err(error) = identity.tls(true) {
        return Check::fail(name, error.to_string(), enrol);
    }
    match X509Certificate::from_der(identity.certificate()) {
        Ok((_, certificate)) => {
            let validity = certificate.validity();
            valid(
                identity.device.as_str(),
                validity.not_before.timestamp(),
                validity.not_after.timestamp(),
                i64::try_from(now_ms / 1000).unwrap_or(i64::MAX),
            )
        }
        Err(error) => Check::fail(
            name,
            format!("the certificate does not parse: {error}"),
            enrol,
        ),
    }
}

/// Judges a certificate's validity; times in Unix seconds.
fn valid(device: &str, from: i64, until: i64, now: i64) -> Check {
    let name = "identity";
    let day = 86_400;
    if now < from {
        return Check::fail(
            name,
            format!(
                "the certificate of {device} is not valid yet: the clock is {} days before it",
                (from - now) / day + 1
            ),
            "set the clock (timedatectl set-ntp true); if the clock is right, the server's was wrong: enrol again",
        );
    }
    let left = (until - now).div_euclid(day);
    let mend = "enrol the device again with `flywheel-agent enroll --force`";
    if until <= now {
        Check::fail(
            name,
            format!("the certificate of {device} has expired"),
            mend,
        )
    } else if left < RENEW_DAYS {
        Check::warn(
            name,
            format!("the certificate of {device} expires in {left} days"),
            mend,
        )
    } else {
        Check::ok(
            name,
            format!("{device}; the key fits, the certificate is valid for {left} days"),
        )
    }
}

/// Whether the source opens and gives a frame. A camera that the agent uses is left alone.
pub fn source(config: &Config, running: bool) -> Check {
    let name = "source";
    let uri = &config.source;
    if running && uri.starts_with("v4l2:") {
        return Check::ok(name, format!("{uri} is in use by the agent"));
    }
    let mut source = match source::open(uri) {
        Ok(source) => source,
        Err(error) => {
            let mend = if uri.starts_with("v4l2:") {
                "plug the camera in, see `v4l2-ctl --list-devices`, and add the agent's user to the group `video`"
            } else {
                "mend `source` in the configuration, or what it names"
            };
            return Check::fail(name, error.to_string(), mend);
        }
    };
    let mut frame = FrameBuf::new();
    let mut skipped = Vec::new();
    for index in 0..TRIES {
        match source.read(index, &mut frame) {
            Ok(Read::Frame) => {
                let meta = frame.meta;
                let detail = format!("{uri} gives frames of {} × {}", meta.width, meta.height);
                return match skipped.first() {
                    None => Check::ok(name, detail),
                    Some(first) => Check::warn(
                        name,
                        format!("{detail}, after {} bad ones such as {first}", skipped.len()),
                        "remove the bad files; the agent skips and counts them",
                    ),
                };
            }
            Ok(Read::Skipped { name, why }) => skipped.push(format!("{name} ({why})")),
            Ok(Read::NotYet) => {
                return Check::ok(name, format!("{uri} is watched; no new picture now"));
            }
            Ok(Read::End) => break,
            Err(error) => {
                return Check::fail(
                    name,
                    error.to_string(),
                    "check cable, power and rights of the source",
                );
            }
        }
    }
    Check::fail(
        name,
        format!("{uri}: no frame in {TRIES} tries: {}", skipped.join(", ")),
        "mend or replace the files",
    )
}

/// Whether the chosen engine can be had.
pub fn engine(config: &Config) -> Check {
    let name = "engine";
    match config.engine.prepare(config.ort_library.as_deref()) {
        Ok(()) => Check::ok(name, config.engine.name()),
        Err(error) => Check::fail(
            name,
            error.to_string(),
            "mend `ort_library`, or choose another `engine`",
        ),
    }
}

/// Whether the live model answers its golden inputs on the configured engine.
pub fn model(config: &Config, identity: &Identity, state: Option<&State>, running: bool) -> Check {
    let name = "model";
    let Some(state) = state else {
        return if running {
            Check::warn(
                name,
                "not tested: the agent uses it",
                "stop the agent and run doctor again to test it",
            )
        } else {
            Check::warn(
                name,
                "none yet",
                "roll one out; until then frames are kept by lot",
            )
        };
    };
    let live = match models::live(&config.data, state) {
        Ok(live) => live,
        Err(error) => {
            return Check::fail(
                name,
                error.to_string(),
                "mend the disk, or move the file away; the cloud offers the model again",
            );
        }
    };
    let Some(live) = live else {
        return Check::warn(
            name,
            "none yet",
            "roll one out; until then frames are kept by lot",
        );
    };
    let loader = Loader::of(&config.data, identity.trust.clone(), config.engine);
    let started = Instant::now();
    match loader.prove(&live.digest) {
        Ok(runner) => Check::ok(
            name,
            format!(
                "{} answers its golden inputs on {} (loaded and run in {} ms)",
                short(&live.digest.to_string()),
                runner.engine().name(),
                started.elapsed().as_millis()
            ),
        ),
        Err(error) => Check::fail(
            name,
            error.to_string(),
            "start the agent: it drops a damaged package and takes the next offer; or choose another `engine`",
        ),
    }
}

fn short(digest: &str) -> &str {
    digest.get(..12).unwrap_or(digest)
}

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::*;

    #[test]
    fn room_is_judged_by_the_quota() {
        assert_eq!(room(600 * MB, 256 * MB).verdict, Verdict::Ok);
        assert_eq!(room(583 * MB, 256 * MB).verdict, Verdict::Warn);
        let full = room(10 * MB, 256 * MB);
        assert_eq!(full.verdict, Verdict::Fail);
        assert!(full.detail.contains("10 MB free") && full.detail.contains("384 MB"));
        assert!(full.mend.contains("spool.quota_mb"));
    }

    #[test]
    fn validity_is_judged_by_the_clock() {
        let day = 86_400;
        let (from, until) = (1000 * day, 2000 * day);
        assert_eq!(valid("cam", from, until, 1500 * day).verdict, Verdict::Ok);
        assert_eq!(valid("cam", from, until, 1971 * day).verdict, Verdict::Warn);
        let expired = valid("cam", from, until, until);
        assert_eq!(expired.verdict, Verdict::Fail);
        assert!(expired.mend.contains("--force"));
        let early = valid("cam", from, until, 0);
        assert_eq!(early.verdict, Verdict::Fail);
        assert!(early.mend.contains("clock"), "{}", early.mend);
    }

    #[test]
    fn a_folder_that_is_not_there_fails_and_one_that_is_stays_clean() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(folder(dir.path()).verdict, Verdict::Ok);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        assert_eq!(folder(&dir.path().join("none")).verdict, Verdict::Fail);
    }

    #[test]
    fn a_source_is_tried_out() {
        let dir = tempfile::tempdir().unwrap();
        let with = |uri: &str| {
            let text = format!("data = \"d\"\nsource = {uri:?}\n");
            Config::parse(Path::new("agent.toml"), &text).unwrap()
        };
        let roads = source(&with("sim:roads?size=16"), false);
        assert_eq!(roads.verdict, Verdict::Ok);
        assert!(roads.detail.contains("16 × 16"));
        let uri = format!("dir:{}", dir.path().display());
        assert_eq!(source(&with(&uri), false).verdict, Verdict::Fail);
        fs::write(dir.path().join("a.png"), b"no picture").unwrap();
        let bad = source(&with(&uri), false);
        assert_eq!(bad.verdict, Verdict::Fail);
        assert!(bad.detail.contains("a.png"), "{}", bad.detail);
        image::RgbImage::new(4, 4)
            .save(dir.path().join("b.png"))
            .unwrap();
        let some = source(&with(&uri), false);
        assert_eq!(some.verdict, Verdict::Warn);
        assert!(some.detail.contains("a.png") && some.detail.contains("4 × 4"));
        assert_eq!(source(&with("v4l2:/dev/video0"), true).verdict, Verdict::Ok);
    }
}
