//! Where the server listens. Ports are chosen once and kept in a file, so that devices, which hold
//! the addresses from enrolment, find a restarted server.

use std::fs;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::store::StoreError;
use crate::store::disk::{RealDisk, write_whole};

/// The addresses of one server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoints {
    /// HTTP API.
    pub http: SocketAddr,
    /// MQTT over TLS, for devices.
    pub mqtt: SocketAddr,
    /// MQTT without TLS on the loopback interface, for the server itself.
    pub mqtt_local: SocketAddr,
    /// QUIC, for devices.
    pub quic: SocketAddr,
}

/// What the operator asks for.
#[derive(Clone, Copy, Debug)]
pub struct Wanted {
    /// The interface for devices and the API.
    pub bind: IpAddr,
    /// Port of the API; `None` for the one used before, or any free one.
    pub http: Option<u16>,
    /// Port of MQTT, likewise.
    pub mqtt: Option<u16>,
    /// Port of QUIC, likewise.
    pub quic: Option<u16>,
}

impl Endpoints {
    /// The addresses to use: what is wanted, else what the file says, else free ports. Writes the
    /// file. Whether the ports are still free shows when they are listened on.
    pub fn settle(file: &Path, wanted: &Wanted) -> Result<Self, StoreError> {
        let before = match fs::read(file) {
            Ok(bytes) => Some(serde_json::from_slice::<Self>(&bytes).map_err(|error| {
                StoreError::Corrupt {
                    path: file.to_owned(),
                    why: format!("{error}; delete it to choose ports anew"),
                }
            })?),
            Err(error) if error.kind() == ErrorKind::NotFound => None,
            Err(error) => return Err(StoreError::io(file, &error)),
        };
        let loopback = IpAddr::V4(Ipv4Addr::LOCALHOST);
        let choose = || {
            // All are held until all are chosen, so that no port is chosen twice.
            let tcp = [wanted.bind, wanted.bind, loopback].map(|ip| TcpListener::bind((ip, 0)));
            let [http, mqtt, local] = tcp;
            let (http, mqtt, local) = (http?, mqtt?, local?);
            let quic = UdpSocket::bind((wanted.bind, 0))?;
            Ok::<_, io::Error>([
                http.local_addr()?.port(),
                mqtt.local_addr()?.port(),
                local.local_addr()?.port(),
                quic.local_addr()?.port(),
            ])
        };
        let free = choose().map_err(|error| StoreError::Io {
            path: file.to_owned(),
            why: format!("no port is free on {}: {error}", wanted.bind),
        })?;
        let [http, mqtt, local, quic] = match &before {
            Some(before) => [before.http, before.mqtt, before.mqtt_local, before.quic]
                .map(|address| address.port()),
            None => free,
        };
        let endpoints = Self {
            http: (wanted.bind, wanted.http.unwrap_or(http)).into(),
            mqtt: (wanted.bind, wanted.mqtt.unwrap_or(mqtt)).into(),
            mqtt_local: (loopback, local).into(),
            quic: (wanted.bind, wanted.quic.unwrap_or(quic)).into(),
        };
        if before != Some(endpoints) {
            let json = serde_json::to_vec_pretty(&endpoints).map_err(|error| StoreError::Io {
                path: file.to_owned(),
                why: error.to_string(),
            })?;
            write_whole(&RealDisk, file, &json)?;
        }
        Ok(endpoints)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_stay_until_others_are_asked_for() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("endpoints.json");
        let any = Wanted {
            bind: IpAddr::V4(Ipv4Addr::LOCALHOST),
            http: None,
            mqtt: None,
            quic: None,
        };
        let first = Endpoints::settle(&file, &any).unwrap();
        assert_ne!(first.http.port(), first.mqtt.port());
        assert_eq!(Endpoints::settle(&file, &any).unwrap(), first);
        let asked = Wanted {
            http: Some(1234),
            ..any
        };
        let second = Endpoints::settle(&file, &asked).unwrap();
        assert_eq!(second.http.port(), 1234);
        assert_eq!((second.mqtt, second.quic), (first.mqtt, first.quic));
        fs::write(&file, "{").unwrap();
        let error = Endpoints::settle(&file, &any).unwrap_err().to_string();
        assert!(
            error.contains("endpoints.json") && error.contains("delete"),
            "{error}"
        );
    }
}
