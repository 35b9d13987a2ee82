//! MQTT over TLS: envelopes up are published to `/tenants/{device}/up`, envelopes down come from
//! `/tenants/{device}/down`. The broker lets a certificate of organisation `device` touch no
//! other topics.
//!
//! One task polls and another publishes: rumqttc's request queue is emptied by polling, so a task
//! that did both would wait for itself once the queue is full.

use std::sync::Arc;
use std::time::Duration;

use rumqttc::{
    AsyncClient, Event, EventLoop, MqttOptions, NetworkOptions, Packet, QoS, SubscribeReasonCode,
    TlsConfiguration, Transport,
};
use tokio::sync::mpsc;

use super::{CONNECT_TIMEOUT, ConnectError, Connection, INBOUND, OUTBOUND, Reason};
use crate::identity::Identity;

/// Largest MQTT packet, well above [`flywheel_shared::MAX_MESSAGE`].
const MAX_PACKET: usize = 2 << 20;
const KEEP_ALIVE: Duration = Duration::from_secs(10);

pub(super) async fn connect(identity: &Identity) -> Result<Connection, ConnectError> {
    let endpoint = &identity.endpoints.mqtt;
    let (host, port) = endpoint
        .rsplit_once(':')
        .and_then(|(host, port)| Some((host, port.parse::<u16>().ok()?)))
        .filter(|(host, _)| !host.is_empty())
        .ok_or_else(|| ConnectError::Address(endpoint.clone()))?;
    let device = identity.device.as_str();
    let tls = Arc::new(identity.tls(false)?);
    let mut options = MqttOptions::new(device, host, port);
    options
        .set_transport(Transport::tls_with_config(TlsConfiguration::Rustls(tls)))
        .set_keep_alive(KEEP_ALIVE)
        .set_clean_session(true)
        .set_max_packet_size(MAX_PACKET, MAX_PACKET);
    let (client, mut events) = AsyncClient::new(options, OUTBOUND);
    let mut network = NetworkOptions::new();
    network.set_connection_timeout(CONNECT_TIMEOUT.as_secs());
    network.set_tcp_nodelay(true);
    events.set_network_options(network);

    let (up, down) = topics(device);
    let subscribed = subscribe(&client, &mut events, &down);
    match tokio::time::timeout(CONNECT_TIMEOUT, subscribed).await {
        Ok(Ok(())) => {}
        Ok(Err(why)) => {
            return Err(ConnectError::Failed {
                endpoint: endpoint.clone(),
                why,
            });
        }
        Err(_) => return Err(ConnectError::Timeout(endpoint.clone())),
    }

    let reason = Reason::default();
    let (outbound, queue) = mpsc::channel(OUTBOUND);
    let (sink, inbound) = mpsc::channel(INBOUND);
    Ok(Connection {
        outbound,
        inbound,
        writer: tokio::spawn(publish(client, up, queue)),
        reader: tokio::spawn(poll(events, sink, reason.clone())),
        reason,
    })
}

/// The topics of a device: up and down.
fn topics(device: &str) -> (String, String) {
    (
        format!("/tenants/{device}/up"),
        format!("/tenants/{device}/down"),
    )
}

/// Waits for the connection and for the broker's word that the subscription stands; what the cloud
/// says before that would be lost.
async fn subscribe(client: &AsyncClient, events: &mut EventLoop, down: &str) -> Result<(), String> {
    loop {
        match events.poll().await {
            Ok(Event::Incoming(Packet::ConnAck(_))) => client
                .try_subscribe(down, QoS::AtLeastOnce)
                .map_err(|error| error.to_string())?,
            Ok(Event::Incoming(Packet::SubAck(answer))) => {
                let refused = answer.return_codes.contains(&SubscribeReasonCode::Failure);
                return if refused {
                    Err(format!("the broker refuses the subscription to {down}"))
                } else {
                    Ok(())
                };
            }
            Ok(_) => {}
            Err(error) => return Err(error.to_string()),
        }
    }
}

async fn publish(client: AsyncClient, topic: String, mut queue: mpsc::Receiver<Vec<u8>>) {
    while let Some(envelope) = queue.recv().await {
        // It fails only when the polling task is gone, which reports the reason itself.
        if client
            .publish(topic.as_str(), QoS::AtLeastOnce, false, envelope)
            .await
            .is_err()
        {
            return;
        }
    }
    // Queued behind everything published before. The poller reads on until the broker closes:
    // closing with unread data would reset the connection and lose what the broker has not read.
    let _ = client.disconnect().await;
}

async fn poll(mut events: EventLoop, sink: mpsc::Sender<Vec<u8>>, reason: Reason) {
    loop {
        match events.poll().await {
            Ok(Event::Incoming(Packet::Publish(message))) => {
                if sink.try_send(message.payload.to_vec()).is_err() {
                    reason.set("messages from the cloud come faster than they are read");
                    return;
                }
            }
            Ok(Event::Incoming(Packet::Disconnect)) => {
                reason.set("the broker disconnected");
                return;
            }
            Ok(_) => {}
            Err(error) => {
                reason.set(error.to_string());
                return;
            }
        }
    }
}
