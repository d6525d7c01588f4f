//! The connections of a worker to nodes: makes them as the lanes order, sends, reads.

use std::io::{self, Read as _, Write as _};
use std::net::SocketAddr;
use std::time::Duration;

use mio::event::Event;
use mio::net::TcpStream;
use mio::{Interest, Registry, Token};

use super::clients::Clients;
use super::{LANES, deregister};
use crate::core::Core;
use crate::core::lane::LaneNo;
use crate::core::lanes::OWN_BIT;
use crate::core::line::{LINE_BIT, is_line};
use crate::core::outbox::Order;

/// A longer beginning of a reply stays where it is instead of being copied to the read buffer.
const CARRY_BYTES_MAX: usize = 64 * 1024;
/// A node that does not acknowledge what was sent for this long is gone, whatever it was doing:
/// the kernel acknowledges, not the process.
const USER_TIMEOUT: Duration = Duration::from_secs(5);
/// When nothing is sent, the same is found out by probes.
const KEEPALIVE: Duration = Duration::from_secs(5);

#[derive(Debug)]
struct NodeSocket {
    socket: TcpStream,
    address: SocketAddr,
    /// The connection stands (until then, writable means that it was decided).
    connected: bool,
    blocked: bool,
    listed: bool,
    read_closed: bool,
}

/// Where the socket of a lane or line is kept: shards' lanes at every third place, then a line, then
/// a client's lane.
fn place(no: LaneNo) -> usize {
    let index = (no & !(LINE_BIT | OWN_BIT)) as usize;
    let kind = if is_line(no) {
        1
    } else if no & OWN_BIT != 0 {
        2
    } else {
        0
    };
    index * 3 + kind
}

/// The lane or line whose socket is at a place.
pub(super) fn at_place(place: usize) -> LaneNo {
    let kind = [0, LINE_BIT, OWN_BIT][place % 3];
    (place / 3) as LaneNo | kind
}

/// See the module. Indexed by [`place`].
#[derive(Debug, Default)]
pub(super) struct Nodes {
    sockets: Vec<Option<NodeSocket>>,
    /// Connections to where a held shard will go. Not registered: nothing is expected of them.
    prepared: Vec<Option<(SocketAddr, TcpStream)>>,
    ready: Vec<LaneNo>,
    spare: Vec<LaneNo>,
}

impl Nodes {
    fn get(&mut self, lane: LaneNo) -> Option<&mut NodeSocket> {
        self.sockets.get_mut(place(lane))?.as_mut()
    }

    pub(super) fn has_ready(&self) -> bool {
        !self.ready.is_empty()
    }

    pub(super) fn note(&mut self, lane: LaneNo, event: &Event, core: &mut Core) {
        let Some(node) = self.get(lane) else { return };
        if !node.connected && (event.is_writable() || event.is_error() || event.is_read_closed()) {
            self.decided(lane, core);
        }
        // The same event may say more, and it will not be said again.
        let Some(node) = self.get(lane).filter(|node| node.connected) else {
            return;
        };
        node.read_closed |= event.is_read_closed() || event.is_error();
        if (event.is_readable() || node.read_closed) && !node.listed {
            node.listed = true;
            self.ready.push(lane);
        }
        if event.is_writable()
            && let Some(node) = self.get(lane)
            && std::mem::take(&mut node.blocked)
        {
            core.lane_touch(lane);
        }
    }

    /// An attempt to connect has succeeded or failed.
    fn decided(&mut self, lane: LaneNo, core: &mut Core) {
        let Some(node) = self.get(lane) else { return };
        match (node.socket.take_error(), node.socket.peer_addr()) {
            (Ok(None), Ok(_)) => {
                node.connected = true;
                core.lane_connected(lane);
            }
            (Ok(None), Err(error)) if error.kind() == io::ErrorKind::NotConnected => {}
            _ => core.lane_abandon(lane),
        }
    }

    /// Takes the socket of a line away, for another process.
    pub(super) fn take_out(&mut self, no: LaneNo, registry: &Registry) -> Option<TcpStream> {
        let mut node = self.sockets.get_mut(place(no))?.take()?;
        // The registration would live on with the other process's copy.
        deregister(registry, &mut node.socket);
        Some(node.socket)
    }

    /// Takes in the socket of a line that stands.
    ///
    /// # Errors
    /// It cannot be watched, or is broken.
    pub(super) fn put_in(
        &mut self,
        no: LaneNo,
        mut socket: TcpStream,
        registry: &Registry,
    ) -> io::Result<()> {
        let address = socket.peer_addr()?;
        let interest = Interest::READABLE | Interest::WRITABLE;
        registry.register(&mut socket, Token(LANES + place(no)), interest)?;
        self.keep_socket(no, socket, address, true);
        Ok(())
    }

    fn keep_socket(&mut self, no: LaneNo, socket: TcpStream, address: SocketAddr, connected: bool) {
        let at = place(no);
        if self.sockets.len() <= at {
            self.sockets.resize_with(at + 1, || None);
        }
        self.sockets[at] = Some(NodeSocket {
            socket,
            address,
            connected,
            blocked: false,
            listed: false,
            read_closed: false,
        });
    }

    /// Carries out the lanes' orders.
    pub(super) fn obey(&mut self, core: &mut Core, registry: &Registry) {
        while !core.out.orders.is_empty() {
            for order in std::mem::take(&mut core.out.orders) {
                match order {
                    Order::Hangup { lane } => self.hang_up(lane, registry),
                    Order::Prepare { lane, address } => self.prepare(lane, address),
                    Order::Dial { lane, address } => {
                        self.hang_up(lane, registry);
                        self.dial(lane, address, core, registry);
                    }
                }
            }
        }
    }

    fn hang_up(&mut self, lane: LaneNo, registry: &Registry) {
        if let Some(mut node) = self.sockets.get_mut(place(lane)).and_then(Option::take) {
            deregister(registry, &mut node.socket);
        }
    }

    fn prepare(&mut self, lane: LaneNo, address: SocketAddr) {
        let at = place(lane);
        if self.prepared.len() <= at {
            self.prepared.resize_with(at + 1, || None);
        }
        if self.prepared[at]
            .as_ref()
            .is_none_or(|(to, _)| *to != address)
        {
            self.prepared[at] = TcpStream::connect(address)
                .ok()
                .map(|socket| (address, socket));
        }
    }

    fn dial(&mut self, lane: LaneNo, address: SocketAddr, core: &mut Core, registry: &Registry) {
        let prepared = self.prepared.get_mut(place(lane)).and_then(Option::take);
        let ready = prepared
            .filter(|(to, _)| *to == address)
            .map(|(_, socket)| socket);
        let made = ready.map_or_else(|| TcpStream::connect(address), Ok);
        let registered = made.and_then(|mut socket| {
            let interest = Interest::READABLE | Interest::WRITABLE;
            registry.register(&mut socket, Token(LANES + place(lane)), interest)?;
            Ok(socket)
        });
        let socket = match registered {
            Ok(socket) => socket,
            Err(error) => {
                tracing::debug!(%address, %error, "a node cannot be dialed");
                core.lane_lost(lane);
                return;
            }
        };
        let options = socket2::SockRef::from(&socket);
        // Without them a dead host is only noticed later.
        let _ = options.set_tcp_nodelay(true);
        let _ = options.set_tcp_user_timeout(Some(USER_TIMEOUT));
        let _ = options.set_tcp_keepalive(&socket2::TcpKeepalive::new().with_time(KEEPALIVE));
        self.keep_socket(lane, socket, address, false);
        // A prepared connection stands already, and its registration tells so too; sooner is better.
        self.decided(lane, core);
    }

    /// Sends once to each touched node.
    pub(super) fn send(&mut self, core: &mut Core) {
        core.seal_batches();
        let mut touched = std::mem::take(&mut core.out.touched);
        for lane in touched.drain(..) {
            core.lane_untouch(lane);
            let Some(node) = self.get(lane) else { continue };
            let unsent = core.lane_unsent(lane);
            if !node.connected || node.blocked || unsent.is_empty() {
                continue;
            }
            match node.socket.write(unsent) {
                Ok(count) => {
                    node.blocked = count < unsent.len();
                    core.lane_sent(lane, count);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => node.blocked = true,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => core.lane_touch(lane),
                Err(error) => {
                    tracing::debug!(address = %node.address, %error, "a node's connection broke");
                    // What it still sent is read first: it holds answers to what it executed.
                    node.read_closed = true;
                    if !node.listed {
                        node.listed = true;
                        self.ready.push(lane);
                    }
                }
            }
        }
        if core.out.touched.is_empty() {
            core.out.touched = touched;
        }
    }

    /// Reads each ready node once.
    pub(super) fn read(&mut self, core: &mut Core, buffer: &mut [u8], clients: &mut Clients) {
        let mut ready = std::mem::replace(&mut self.ready, std::mem::take(&mut self.spare));
        for lane in ready.drain(..) {
            if let Some(node) = self.get(lane) {
                node.listed = false;
                self.read_one(lane, core, buffer, clients);
            }
        }
        self.spare = ready;
    }

    fn read_one(
        &mut self,
        lane: LaneNo,
        core: &mut Core,
        buffer: &mut [u8],
        clients: &mut Clients,
    ) {
        let Some(node) = self.sockets.get_mut(place(lane)).and_then(Option::as_mut) else {
            return;
        };
        if !node.connected {
            return; // listed for the connection before this one
        }
        let mut input = core.take_lane_input(lane);
        let carried = if input.len() <= CARRY_BYTES_MAX {
            input.len()
        } else {
            0
        };
        buffer[..carried].copy_from_slice(&input[..carried]);
        let count = match node.socket.read(&mut buffer[carried..]) {
            Ok(0) => return core.lane_abandon(lane),
            Ok(count) => count,
            Err(error) => {
                core.keep_lane_input(lane, input);
                match error.kind() {
                    io::ErrorKind::WouldBlock if !node.read_closed => {}
                    io::ErrorKind::Interrupted => {
                        node.listed = true;
                        self.ready.push(lane);
                    }
                    _ => core.lane_abandon(lane),
                }
                return;
            }
        };
        if carried + count == buffer.len() || node.read_closed {
            node.listed = true;
            self.ready.push(lane);
        }
        let large = carried < input.len();
        let taken = if large {
            input.extend_from_slice(&buffer[..count]);
            core.node_bytes(lane, &input, clients)
        } else {
            core.node_bytes(lane, &buffer[..carried + count], clients)
        };
        match taken {
            Ok(used) if large => {
                input.drain(..used);
                if input.is_empty() {
                    input = Vec::new(); // one large reply must not keep its memory
                }
            }
            Ok(used) => {
                input.clear();
                input.extend_from_slice(&buffer[used..carried + count]);
            }
            Err(fault) => {
                tracing::warn!(address = %node.address, %fault, "a node's connection is given up");
                return core.lane_abandon(lane);
            }
        }
        core.keep_lane_input(lane, input);
    }
}
