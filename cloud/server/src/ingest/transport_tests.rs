//! Real sockets: a real rumqttd with TLS, real QUIC, and clients with certificates of their own.

use super::broker::{BrokerOptions, LocalBroker};
use super::fixtures::{Identity, World, batch, hello, with_down};
use super::mqtt::{MqttLink, MqttOptions};
use super::*;
use crate::pki::{ALPN, Pki, SERVER_NAME};
use crate::store::fixtures::sample;
use flywheel_shared::envelope::HEADER;
use quinn::crypto::rustls::QuicClientConfig;
use quinn::{Connection, Endpoint, RecvStream, SendStream};
use rcgen::{CertificateParams, KeyPair, PKCS_ED25519};
use rumqttc::{AsyncClient, Event, EventLoop, Packet, QoS};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;
use tokio::io::AsyncWriteExt as _;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

/// Ends a test that hangs; nothing waits for it in a test that passes.
const HANG: Duration = Duration::from_secs(30);

async fn soon<F: Future>(future: F) -> F::Output {
    tokio::time::timeout(HANG, future).await.expect("it hangs")
}

struct Broker {
    devices: SocketAddr,
    local: LocalBroker,
}

impl Broker {
    fn start(world: &World) -> Self {
        let any = endpoints::Wanted {
            bind: IpAddr::V4(Ipv4Addr::LOCALHOST),
            http: None,
            mqtt: None,
            quic: None,
        };
        let file = world.dir.path().join("endpoints.json");
        let endpoints = endpoints::Endpoints::settle(&file, &any).unwrap();
        let local = broker::start(&BrokerOptions {
            listen: endpoints.mqtt,
            local: endpoints.mqtt_local,
            paths: world.pki.paths().clone(),
        });
        Self {
            devices: endpoints.mqtt,
            local: local.unwrap(),
        }
    }

    fn options(&self) -> MqttOptions {
        MqttOptions {
            host: self.local.address.ip().to_string(),
            port: self.local.address.port(),
            credentials: Some(self.local.credentials.clone()),
            tls: None,
            client_id: "ingest".to_owned(),
            patience: HANG,
        }
    }

    async fn link(&self, world: &World) -> MqttLink {
        mqtt::start(world.ingest.clone(), &self.options())
            .await
            .unwrap()
    }
}

fn client(
    address: SocketAddr,
    ca_pem: &str,
    identity: Option<(&str, &str)>,
) -> (AsyncClient, EventLoop) {
    let mut options = rumqttc::MqttOptions::new("c", address.ip().to_string(), address.port());
    let identity = identity.map(|(certificate, key)| (certificate.into(), key.into()));
    options
        .set_keep_alive(Duration::from_secs(20))
        .set_max_packet_size(mqtt::MAX_PACKET, mqtt::MAX_PACKET)
        .set_transport(rumqttc::Transport::tls(ca_pem.into(), identity, None));
    AsyncClient::new(options, 16)
}

fn device_client(world: &World, broker: &Broker, device: &Identity) -> (AsyncClient, EventLoop) {
    let identity = (device.certificate_pem.as_str(), device.key_pem.as_str());
    client(broker.devices, world.pki.ca_pem(), Some(identity))
}

/// Polls until the connection is refused or dropped.
async fn dropped(events: &mut EventLoop) {
    soon(async { while events.poll().await.is_ok() {} }).await;
}

async fn received(events: &mut EventLoop) -> Vec<u8> {
    soon(async {
        loop {
            if let Event::Incoming(Packet::Publish(publish)) = events.poll().await.unwrap() {
                return publish.payload.to_vec();
            }
        }
    })
    .await
}

/// A client that is subscribed to what is sent to its device.
async fn subscribed(world: &World, broker: &Broker, device: &Identity) -> (AsyncClient, EventLoop) {
    let (client, mut events) = device_client(world, broker, device);
    let topic = format!("/tenants/{}/down", device.id);
    client.subscribe(topic, QoS::AtLeastOnce).await.unwrap();
    soon(async {
        while !matches!(
            events.poll().await.unwrap(),
            Event::Incoming(Packet::SubAck(_))
        ) {}
    })
    .await;
    (client, events)
}

async fn publish(client: &AsyncClient, tenant: &str, bytes: Vec<u8>) {
    let topic = format!("/tenants/{tenant}/up");
    client
        .publish(topic, QoS::AtLeastOnce, false, bytes)
        .await
        .unwrap();
}

fn is_welcome(bytes: &[u8]) -> bool {
    with_down(bytes, |down| matches!(down, Down::Welcome(_)))
}

fn is_ack(bytes: &[u8]) -> bool {
    with_down(bytes, |down| matches!(down, Down::Ack(_)))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn mqtt_carries_both_ways() {
    let world = World::new();
    let cam1 = world.enroll("cam1");
    let broker = Broker::start(&world);
    let link = broker.link(&world).await;
    assert!(link.is_connected());
    let (client, mut events) = subscribed(&world, &broker, &cam1).await;
    publish(&client, "cam1", hello(&cam1.id)).await;
    assert!(is_welcome(&received(&mut events).await));
    // Larger than MQTT clients take by default.
    let picture = vec![9; 400_000];
    publish(&client, "cam1", batch(&cam1, 1, &[sample(1, &picture)])).await;
    assert!(is_ack(&received(&mut events).await));
    let (_, meta) = &world.store.samples(0, 10).unwrap()[0];
    assert_eq!(world.store.picture(&meta.blob).unwrap().unwrap(), picture);
    assert!(world.ingest.push_desired(&cam1.id, 33));
    let pushed = received(&mut events).await;
    with_down(&pushed, |down| match down {
        Down::Desired(desired) => assert_eq!(desired.run_until, 33),
        other => panic!("{other:?}"),
    });
    world.ingest.revoke(&cam1.id).unwrap();
    let refused = |bytes: &[u8]| {
        with_down(bytes, |down| match down {
            Down::Refused(refused) => assert_eq!(refused.code, RefusedCode::Identity),
            other => panic!("{other:?}"),
        });
    };
    refused(&received(&mut events).await);
    publish(&client, "cam1", batch(&cam1, 1, &[sample(2, b"x")])).await;
    refused(&received(&mut events).await);
    assert_eq!(world.store.samples(0, 10).unwrap().len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn mqtt_keeps_a_device_to_its_own_topics() {
    let world = World::new();
    let (cam1, cam2) = (world.enroll("cam1"), world.enroll("cam2"));
    let broker = Broker::start(&world);
    let link = broker.link(&world).await;
    let (victim, mut victim_events) = subscribed(&world, &broker, &cam2).await;
    for topic in ["/tenants/cam2/up", "/tenants/cam2/down", "/other"] {
        let (client, mut events) = device_client(&world, &broker, &cam1);
        let forged = batch(&cam1, 1, &[sample(1, b"x")]);
        client
            .publish(topic, QoS::AtLeastOnce, false, forged)
            .await
            .unwrap();
        dropped(&mut events).await;
    }
    for filter in [
        "/tenants/cam2/down",
        "/tenants/+/up",
        "#",
        "$share/g//tenants/cam2/down",
    ] {
        let (client, mut events) = device_client(&world, &broker, &cam1);
        client.subscribe(filter, QoS::AtLeastOnce).await.unwrap();
        dropped(&mut events).await;
    }
    // The first thing that the victim hears is the answer to its own words.
    publish(&victim, "cam2", hello(&cam2.id)).await;
    assert!(is_welcome(&received(&mut victim_events).await));
    assert!(link.is_connected());
    assert!(world.store.samples(0, 10).unwrap().is_empty());
    assert_eq!(world.store.traffic(&cam2.id).unwrap().messages, 1);
}

/// An identity of another fleet that calls itself by the name of a device of this one.
fn impostor(name: &str) -> (String, String) {
    let dir = tempfile::tempdir().unwrap();
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap();
    let now = now.as_millis() as u64;
    let pki = Pki::open(dir.path(), &[], now).unwrap();
    let key = KeyPair::generate_for(&PKCS_ED25519).unwrap();
    let csr = CertificateParams::default()
        .serialize_request(&key)
        .unwrap();
    let issued = pki
        .issue(&csr.pem().unwrap(), &name.parse().unwrap(), now)
        .unwrap();
    (issued.certificate_pem, key.serialize_pem())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn mqtt_lets_nobody_in_without_a_certificate_of_the_fleet() {
    let world = World::new();
    let cam1 = world.enroll("cam1");
    let broker = Broker::start(&world);
    let link = broker.link(&world).await;
    let ca = world.pki.ca_pem();
    let (certificate, key) = impostor("cam1");
    for identity in [None, Some((certificate.as_str(), key.as_str()))] {
        let (client, mut events) = client(broker.devices, ca, identity);
        publish(&client, "cam1", hello(&cam1.id)).await;
        dropped(&mut events).await;
    }
    // The server's own listener, without its password and with a wrong one.
    for password in [None, Some("guess")] {
        let local = broker.local.address;
        let mut options = rumqttc::MqttOptions::new("c", local.ip().to_string(), local.port());
        if let Some(password) = password {
            options.set_credentials(broker.local.credentials.0.clone(), password);
        }
        let (_client, mut events) = AsyncClient::new(options, 16);
        dropped(&mut events).await;
    }
    assert!(link.is_connected());
    assert_eq!(world.store.traffic(&cam1.id).unwrap().messages, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_that_never_finish_their_handshake_lock_nobody_out() {
    let world = World::new();
    let cam1 = world.enroll("cam1");
    let broker = Broker::start(&world);
    let link = broker.link(&world).await;
    let mut stuck = Vec::new();
    for _ in 0..3 {
        let mut stream = TcpStream::connect(broker.devices).await.unwrap();
        // The beginning of a TLS record that never comes to its end.
        stream.write_all(&[22, 3, 1, 2, 0, 1]).await.unwrap();
        stuck.push(stream);
    }
    let (client, mut events) = subscribed(&world, &broker, &cam1).await;
    publish(&client, "cam1", hello(&cam1.id)).await;
    assert!(is_welcome(&received(&mut events).await));
    assert!(link.is_connected());
}

/// Passes connections on to `target` until told to cut them.
async fn proxy(target: SocketAddr) -> (SocketAddr, tokio::sync::mpsc::Sender<()>) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    let (cut, mut cuts) = tokio::sync::mpsc::channel(1);
    tokio::spawn(async move {
        let mut passing = JoinSet::new();
        loop {
            tokio::select! {
                accepted = listener.accept() => {
                    let (mut near, _) = accepted.unwrap();
                    passing.spawn(async move {
                        let mut far = TcpStream::connect(target).await.unwrap();
                        let _ = tokio::io::copy_bidirectional(&mut near, &mut far).await;
                    });
                }
                Some(()) = cuts.recv() => passing.shutdown().await,
                else => return,
            }
        }
    });
    (address, cut)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_link_to_the_broker_heals() {
    let world = World::new();
    let cam1 = world.enroll("cam1");
    let broker = Broker::start(&world);
    let (address, cut) = proxy(broker.local.address).await;
    let mut options = broker.options();
    options.port = address.port();
    let link = mqtt::start(world.ingest.clone(), &options).await.unwrap();
    let (client, mut events) = subscribed(&world, &broker, &cam1).await;
    for seq in 1..=3_u32 {
        publish(&client, "cam1", batch(&cam1, 1, &[sample(seq, b"x")])).await;
        assert!(is_ack(&received(&mut events).await));
        cut.send(()).await.unwrap();
        soon(link.connected(u64::from(seq) + 1)).await;
    }
    assert_eq!(world.store.samples(0, 10).unwrap().len(), 3);
}

struct Quic {
    connection: Connection,
    send: SendStream,
    receive: RecvStream,
}

impl Quic {
    async fn connect(
        address: SocketAddr,
        ca_pem: &str,
        identity: Option<(&str, &str)>,
    ) -> Result<Self, quinn::ConnectionError> {
        let mut roots = rustls::RootCertStore::empty();
        roots
            .add(CertificateDer::from_pem_slice(ca_pem.as_bytes()).unwrap())
            .unwrap();
        let builder = rustls::ClientConfig::builder().with_root_certificates(roots);
        let mut tls = match identity {
            None => builder.with_no_client_auth(),
            Some((certificate, key)) => {
                let chain = vec![CertificateDer::from_pem_slice(certificate.as_bytes()).unwrap()];
                let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap();
                builder.with_client_auth_cert(chain, key).unwrap()
            }
        };
        tls.alpn_protocols = vec![ALPN.to_vec()];
        let config = QuicClientConfig::try_from(tls).unwrap();
        let mut endpoint = Endpoint::client((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        endpoint.set_default_client_config(quinn::ClientConfig::new(Arc::new(config)));
        let connection = endpoint.connect(address, SERVER_NAME).unwrap().await?;
        let (send, receive) = connection.open_bi().await?;
        Ok(Self {
            connection,
            send,
            receive,
        })
    }

    async fn of(world: &World, address: SocketAddr, device: &Identity) -> Self {
        let identity = (device.certificate_pem.as_str(), device.key_pem.as_str());
        Self::connect(address, world.pki.ca_pem(), Some(identity))
            .await
            .unwrap()
    }

    async fn ask(&mut self, bytes: &[u8]) -> Option<Vec<u8>> {
        self.send.write_all(bytes).await.ok()?;
        self.answer().await
    }

    async fn answer(&mut self) -> Option<Vec<u8>> {
        let mut bytes = vec![0; HEADER];
        self.receive.read_exact(&mut bytes).await.ok()?;
        let len = u32::from_le_bytes(bytes[..4].try_into().unwrap()) as usize;
        bytes.resize(HEADER + len, 0);
        self.receive.read_exact(&mut bytes[HEADER..]).await.ok()?;
        Some(bytes)
    }

    /// The code with which the server ends the connection.
    async fn end(&self) -> u64 {
        match soon(self.connection.closed()).await {
            quinn::ConnectionError::ApplicationClosed(close) => close.error_code.into_inner(),
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn quic_carries_both_ways_and_knows_who_speaks() {
    let world = World::new();
    let (cam1, cam2) = (world.enroll("cam1"), world.enroll("cam2"));
    let listener = quic::listen(
        world.ingest.clone(),
        &world.pki,
        (Ipv4Addr::LOCALHOST, 0).into(),
    )
    .unwrap();
    let address = listener.local_addr().unwrap();
    let mut quic = soon(Quic::of(&world, address, &cam1)).await;
    assert!(is_welcome(&soon(quic.ask(&hello(&cam1.id))).await.unwrap()));
    let picture = vec![9; 400_000];
    let bytes = batch(&cam1, 1, &[sample(1, &picture)]);
    assert!(is_ack(&soon(quic.ask(&bytes)).await.unwrap()));
    assert!(world.ingest.push_desired(&cam1.id, 33));
    let pushed = soon(quic.answer()).await.unwrap();
    with_down(&pushed, |down| assert!(matches!(down, Down::Desired(_))));
    // By the certificate of one, in the name and with the batch of another.
    for bytes in [hello(&cam2.id), batch(&cam2, 1, &[sample(1, b"x")])] {
        let refused = soon(quic.ask(&bytes)).await.unwrap();
        with_down(&refused, |down| {
            assert!(matches!(down, Down::Refused(_)), "{down:?}")
        });
    }
    assert_eq!(world.store.samples(0, 10).unwrap().len(), 1);
    // A newer connection of the same device takes over.
    let mut newer = soon(Quic::of(&world, address, &cam1)).await;
    assert!(is_welcome(
        &soon(newer.ask(&hello(&cam1.id))).await.unwrap()
    ));
    quic.end().await;
    assert!(world.ingest.push_desired(&cam1.id, 34));
    soon(newer.answer()).await.unwrap();
    // Whoever is revoked is shut out at once, and at the door.
    world.ingest.revoke(&cam1.id).unwrap();
    assert_eq!(newer.end().await, 1);
    let identity = (cam1.certificate_pem.as_str(), cam1.key_pem.as_str());
    match soon(Quic::connect(address, world.pki.ca_pem(), Some(identity))).await {
        Ok(again) => assert_eq!(again.end().await, 1),
        Err(quinn::ConnectionError::ApplicationClosed(close)) => {
            assert_eq!(close.error_code.into_inner(), 1);
        }
        Err(other) => panic!("{other:?}"),
    }
    listener.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn quic_lets_nobody_in_without_a_certificate_and_stops_at_nonsense() {
    let world = World::new();
    let cam1 = world.enroll("cam1");
    let listener = quic::listen(
        world.ingest.clone(),
        &world.pki,
        (Ipv4Addr::LOCALHOST, 0).into(),
    )
    .unwrap();
    let address = listener.local_addr().unwrap();
    let (certificate, key) = impostor("cam1");
    for identity in [None, Some((certificate.as_str(), key.as_str()))] {
        // The client may believe that it is connected until the server has seen its certificate.
        if let Ok(mut quic) = soon(Quic::connect(address, world.pki.ca_pem(), identity)).await {
            assert_eq!(soon(quic.ask(&hello(&cam1.id))).await, None);
            let end = soon(quic.connection.closed()).await;
            assert!(
                matches!(end, quinn::ConnectionError::ConnectionClosed(_)),
                "{end:?}"
            );
        }
    }
    let mut quic = soon(Quic::of(&world, address, &cam1)).await;
    let damaged = {
        let mut bytes = hello(&cam1.id);
        bytes[HEADER] ^= 1;
        bytes
    };
    let refused = soon(quic.ask(&damaged)).await.unwrap();
    with_down(&refused, |down| assert!(matches!(down, Down::Refused(_))));
    assert!(is_welcome(&soon(quic.ask(&hello(&cam1.id))).await.unwrap()));
    quic.send.write_all(&[0xFF; HEADER]).await.unwrap();
    assert_eq!(quic.end().await, 2);
}
