//! CLIENT MAINT_NOTIFICATIONS: which clients want to be told before they must go elsewhere, and the
//! push MOVING that tells them.
//!
//! Invariant: only a client that asked for it hears MOVING, and it hears no address that libraries are
//! known to take amiss. Such a client is closed as one that did not ask, which is noticed less.
//!
//! What the libraries do with it (their sources; redis-py 8.1, node-redis 6, go-redis 9, Lettuce 7):
//! - all of them connect to `host:port` at once, finish what is in flight at the old connection, and
//!   forget the address after the seconds; redis-py takes the host only and keeps its own port;
//! - with null they connect to the address that they were given, after half of the seconds; node-redis
//!   takes a null that it did not ask for by `none` as a fault, and its process ends;
//! - redis-py takes two pushes with one number and address as one, so that one moves its whole pool.

use std::net::{IpAddr, SocketAddr};

use slotmesh_proto::handover::v1 as pb;
use slotmesh_resp::{Protocol, write};

use super::Core;
use super::client::Client;
use super::departing::{Departure, Elsewhere};
use super::dispatch::Flow;

/// What its libraries call themselves who keep their port, whatever they are told.
const KEEPS_ITS_PORT: &[u8] = b"redis-py";

/// The address that a client wants to be told, by its moving-endpoint-type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wish {
    /// It did not say.
    Any,
    InternalIp,
    InternalFqdn,
    ExternalIp,
    ExternalFqdn,
    /// None: it knows where to go.
    NoAddress,
}

impl Wish {
    /// The words of a client.
    fn parse(word: &[u8]) -> Option<Self> {
        Some(match word.to_ascii_lowercase().as_slice() {
            b"internal-ip" => Self::InternalIp,
            b"internal-fqdn" => Self::InternalFqdn,
            b"external-ip" => Self::ExternalIp,
            b"external-fqdn" => Self::ExternalFqdn,
            b"none" => Self::NoAddress,
            _ => return None,
        })
    }

    pub(super) fn told(wish: Option<Self>) -> pb::Moving {
        match wish {
            None => pb::Moving::Off,
            Some(Self::Any) => pb::Moving::Any,
            Some(Self::InternalIp) => pb::Moving::InternalIp,
            Some(Self::InternalFqdn) => pb::Moving::InternalFqdn,
            Some(Self::ExternalIp) => pb::Moving::ExternalIp,
            Some(Self::ExternalFqdn) => pb::Moving::ExternalFqdn,
            Some(Self::NoAddress) => pb::Moving::None,
        }
    }

    pub(super) fn read(told: pb::Moving) -> Option<Self> {
        Some(match told {
            pb::Moving::Off => return None,
            pb::Moving::Any => Self::Any,
            pb::Moving::InternalIp => Self::InternalIp,
            pb::Moving::InternalFqdn => Self::InternalFqdn,
            pb::Moving::ExternalIp => Self::ExternalIp,
            pb::Moving::ExternalFqdn => Self::ExternalFqdn,
            pb::Moving::None => Self::NoAddress,
        })
    }

    fn is_name(self) -> bool {
        matches!(self, Self::InternalFqdn | Self::ExternalFqdn)
    }

    /// Whether the address at which a connection arrived can be the one that its client used: it may
    /// have been translated on the way, unless the client is inside or the address is everybody's.
    fn suits(self, address: IpAddr) -> bool {
        match self {
            Self::InternalIp => true,
            // A name stands in its certificate, and is not known here.
            Self::InternalFqdn | Self::ExternalFqdn | Self::NoAddress => false,
            Self::Any | Self::ExternalIp => match address {
                IpAddr::V4(ip) => !(ip.is_private() || ip.is_loopback() || ip.is_link_local()),
                IpAddr::V6(ip) => !(ip.is_unique_local() || ip.is_loopback()),
            },
        }
    }
}

impl Client {
    /// HELLO and RESET: what only RESP3 has ends with it.
    pub(super) fn set_protocol(&mut self, protocol: Protocol) {
        self.state.protocol = protocol;
        if protocol == Protocol::Resp2 {
            self.state.moving = None;
        }
    }

    /// What it is told of a departure: an address, or null. `None`: it is told nothing. `own` is where
    /// the process says that it is.
    pub(super) fn told_address(
        &self,
        elsewhere: &Elsewhere,
        own: Option<&str>,
        own_port: u16,
    ) -> Option<Option<String>> {
        let wish = self.state.moving.filter(|_| !self.is_muted())?;
        if wish == Wish::NoAddress {
            return Some(None);
        }
        let address = match elsewhere {
            Elsewhere::At(address) => address.clone(),
            Elsewhere::Anywhere => return None,
            Elsewhere::Here => match (own, self.local) {
                (Some(own), _) => own.to_owned(),
                (None, Some(local)) if wish.suits(local.ip()) => local.to_string(),
                (None, _) => return None,
            },
        };
        if self.encrypted && wish.is_name() && !is_name(&address) {
            return None; // it would not find the name that it knows in the certificate
        }
        let names = self.state.names.as_ref();
        let keeps_port = names.is_some_and(|n| n.library_name.starts_with(KEEPS_ITS_PORT));
        if keeps_port && port_of(&address) != own.map_or(Some(own_port), port_of) {
            return None; // it would go to whoever is at its own port there
        }
        Some(Some(address))
    }
}

fn port_of(address: &str) -> Option<u16> {
    let socket = address.parse::<SocketAddr>().map(|address| address.port());
    socket
        .ok()
        .or_else(|| address.rsplit_once(':')?.1.parse().ok())
}

fn is_name(address: &str) -> bool {
    let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
    address.parse::<SocketAddr>().is_err() && host.parse::<IpAddr>().is_err()
}

/// The push itself.
pub(super) fn moving(departure: &Departure, seconds: u64, address: Option<&str>) -> Vec<u8> {
    let mut out = Vec::new();
    write::write_push_header(&mut out, Protocol::Resp3, 4);
    write::write_bulk(&mut out, b"MOVING");
    write::write_int(&mut out, departure.number);
    write::write_int(&mut out, i64::try_from(seconds).unwrap_or(i64::MAX));
    match address {
        Some(address) => write::write_bulk(&mut out, address.as_bytes()),
        None => write::write_null(&mut out, Protocol::Resp3),
    }
    out
}

impl Core {
    pub(super) fn client_maint_notifications(&mut self, slot: u32, words: &[&[u8]]) -> Flow {
        let is =
            |at: usize, word: &[u8]| words.get(at).is_some_and(|w| w.eq_ignore_ascii_case(word));
        let wish = match words {
            [_] if is(0, b"off") => None,
            [_] if is(0, b"on") => Some(Wish::Any),
            [_, _, kind] if is(0, b"on") && is(1, b"moving-endpoint-type") => {
                match Wish::parse(kind) {
                    Some(wish) => Some(wish),
                    None => return self.reply_error(slot, b"ERR Invalid moving-endpoint-type"),
                }
            }
            _ => return self.reply_error(slot, b"ERR syntax error"),
        };
        if wish.is_some() && self.protocol(slot) != Protocol::Resp3 {
            let text =
                b"ERR CLIENT MAINT_NOTIFICATIONS is only supported in RESP3; call HELLO 3 first";
            return self.reply_error(slot, text);
        }
        if let Some(client) = self.sessions.get_mut(slot) {
            client.state.moving = wish;
        }
        let flow = self.reply_simple(slot, "OK");
        self.tell_late(slot);
        flow
    }
}
