//! What an external broker needs to hold every device to its own topics: configuration, access
//! list and a certificate of its own for mosquitto, in one folder that can be carried to another
//! machine.
//!
//! One listener, TLS only. Whoever connects must have a certificate of the fleet's authority, and
//! its common name is who it is: a device may publish to `/tenants/{device}/up` and read
//! `/tenants/{device}/down`, the cloud's ingest ([`INGEST_NAME`]) the reverse of all.

use std::fs;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::mqtt::MAX_PACKET;
use crate::pki::{self, INGEST_NAME, Pki, PkiError};

/// Messages on their way to one client at a time.
const INFLIGHT: u32 = 100;
/// Messages that wait for one client.
const QUEUED: u32 = 10_000;

/// Where the files are.
#[derive(Clone, Debug, Serialize)]
pub struct BrokerFiles {
    /// mosquitto's configuration, which names the others.
    pub config: PathBuf,
    /// The access list.
    pub acl: PathBuf,
    /// The fleet's authority, PEM.
    pub authority: PathBuf,
    /// The broker's certificate, PEM.
    pub certificate: PathBuf,
    /// Its private key, PEM.
    pub key: PathBuf,
}

/// Writes the files into `out`, for a broker that listens on `port` and that devices reach under
/// `hosts`. A certificate that is there is replaced.
///
/// # Errors
/// If a file can't be written or no certificate made.
pub fn write(
    pki: &Pki,
    out: &Path,
    port: u16,
    hosts: &[String],
    now_ms: u64,
) -> Result<BrokerFiles, PkiError> {
    let io = |error| PkiError::Io {
        path: out.to_owned(),
        error,
    };
    // mosquitto reads relative paths from wherever it is started.
    let out = std::path::absolute(out).map_err(io)?;
    fs::create_dir_all(&out).map_err(io)?;
    let files = BrokerFiles {
        config: out.join("mosquitto.conf"),
        acl: out.join("flywheel.acl"),
        authority: out.join("ca.pem"),
        certificate: out.join("broker.pem"),
        key: out.join("broker.key.pem"),
    };
    let (certificate, key) = pki.broker(hosts, now_ms)?;
    pki::write(&files.authority, pki.ca_pem())?;
    pki::write(&files.certificate, &certificate)?;
    pki::write(&files.key, &key)?;
    pki::write(&files.acl, &acl())?;
    pki::write(&files.config, &config(&files, port))?;
    Ok(files)
}

fn config(files: &BrokerFiles, port: u16) -> String {
    format!(
        "# Written by `flywheel device acl`. mosquitto's own user must be able to read this folder:\n\
         # chown -R mosquitto {out}\n\
         listener {port}\n\
         cafile {ca}\n\
         certfile {certificate}\n\
         keyfile {key}\n\
         require_certificate true\n\
         use_identity_as_username true\n\
         allow_anonymous false\n\
         acl_file {acl}\n\
         max_packet_size {MAX_PACKET}\n\
         max_inflight_messages {INFLIGHT}\n\
         max_queued_messages {QUEUED}\n\
         persistence false\n",
        out = files.config.parent().unwrap_or(Path::new(".")).display(),
        ca = files.authority.display(),
        certificate = files.certificate.display(),
        key = files.key.display(),
        acl = files.acl.display(),
    )
}

fn acl() -> String {
    format!(
        "# Written by `flywheel device acl`: %u is the common name of the client's certificate.\n\
         user {INGEST_NAME}\n\
         topic read /tenants/+/up\n\
         topic write /tenants/+/down\n\
         \n\
         pattern write /tenants/%u/up\n\
         pattern read /tenants/%u/down\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_files_name_what_exists_and_no_device_can_be_the_ingest() {
        let dir = tempfile::tempdir().unwrap();
        let pki = Pki::open(&dir.path().join("pki"), &[], 1_800_000_000_000).unwrap();
        let out = dir.path().join("broker");
        let files = write(&pki, &out, 8883, &[], 1_800_000_000_000).unwrap();
        let config = fs::read_to_string(&files.config).unwrap();
        for key in ["cafile", "certfile", "keyfile", "acl_file"] {
            let line = config.lines().find(|line| line.starts_with(key)).unwrap();
            let path = line.split_once(' ').unwrap().1;
            assert!(Path::new(path).exists(), "{line}");
        }
        let acl = fs::read_to_string(&files.acl).unwrap();
        assert!(acl.contains("pattern write /tenants/%u/up"), "{acl}");
        assert!(
            INGEST_NAME
                .parse::<flywheel_shared::ids::DeviceId>()
                .is_err()
        );
    }
}
