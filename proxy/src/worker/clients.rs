//! The sockets of a worker's clients: reads them, sends to them, closes them.

use std::io::{self, Read as _, Write as _};

use mio::event::Event;
use mio::net::TcpStream;
use mio::{Interest, Registry, Token};

use super::{Accepted, deregister};
use crate::core::Core;
use crate::core::client::Pause;
use crate::core::sessions::{CloseReason, Outlet};

/// A longer beginning of a command stays where it is instead of being copied to the read buffer.
const CARRY_BYTES_MAX: usize = 64 * 1024;

#[derive(Debug)]
struct ClientSocket {
    socket: TcpStream,
    /// A read may find something.
    readable: bool,
    /// The peer has sent its last byte: read to the end, however short the reads are.
    read_closed: bool,
    /// The socket took less than it was given.
    blocked: bool,
    /// In the ready list.
    listed: bool,
}

/// See the module. Indexed by the client's slot.
#[derive(Debug, Default)]
pub(super) struct Clients {
    sockets: Vec<Option<ClientSocket>>,
    ready: Vec<u32>,
    spare: Vec<u32>,
}

impl Clients {
    fn get(&mut self, slot: u32) -> Option<&mut ClientSocket> {
        self.sockets.get_mut(slot as usize)?.as_mut()
    }

    /// Takes a client in. `None` if it cannot be watched and was let go.
    pub(super) fn open(
        &mut self,
        new: Accepted,
        core: &mut Core,
        registry: &Registry,
    ) -> Option<u32> {
        let mut socket = TcpStream::from_std(new.socket);
        let counts = new.reserved.is_some(); // since it was awaited
        let slot = match new.reserved {
            None => core.open_client(new.state),
            Some((slot, generation)) if core.arrive(slot, generation, new.state) => slot,
            Some(_) => return None, // it heard more than it may leave unread
        };
        if let Some(session) = core.sessions.get_mut(slot) {
            session.local = socket.local_addr().ok();
        }
        let interest = Interest::READABLE | Interest::WRITABLE;
        if let Err(error) = registry.register(&mut socket, Token(slot as usize), interest) {
            tracing::warn!(%error, "a client cannot be watched");
            if counts {
                core.sessions.doom(slot, CloseReason::Done);
            } else {
                core.close_client(slot);
            }
            return None;
        }
        self.keep_socket(slot, socket);
        Some(slot)
    }

    fn keep_socket(&mut self, slot: u32, socket: TcpStream) {
        let at = slot as usize;
        if self.sockets.len() <= at {
            self.sockets.resize_with(at + 1, || None);
        }
        self.sockets[at] = Some(ClientSocket {
            socket,
            readable: false,
            read_closed: false,
            blocked: false,
            listed: false,
        });
    }

    /// True if the client's socket is here.
    pub(super) fn has(&self, slot: u32) -> bool {
        self.sockets.get(slot as usize).is_some_and(Option::is_some)
    }

    /// Takes the socket of a client away: it is neither read nor written until it comes back.
    pub(super) fn take_out(&mut self, slot: u32, registry: &Registry) -> Option<TcpStream> {
        let mut client = self.sockets.get_mut(slot as usize)?.take()?;
        // The registration would live on with the other process's copy.
        deregister(registry, &mut client.socket);
        Some(client.socket)
    }

    /// A socket that was taken out comes back. What happened meanwhile is told by its registration.
    pub(super) fn put_back(
        &mut self,
        slot: u32,
        mut socket: TcpStream,
        core: &mut Core,
        registry: &Registry,
    ) {
        let interest = Interest::READABLE | Interest::WRITABLE;
        if let Err(error) = registry.register(&mut socket, Token(slot as usize), interest) {
            tracing::warn!(%error, "a client cannot be watched");
            return core.sessions.doom(slot, CloseReason::Done);
        }
        self.keep_socket(slot, socket);
        core.sessions.touch(slot);
    }

    pub(super) fn note(&mut self, slot: u32, event: &Event, core: &mut Core) {
        let Some(client) = self.get(slot) else { return };
        if event.is_readable() || event.is_read_closed() || event.is_error() {
            client.readable = true;
            client.read_closed |= event.is_read_closed() || event.is_error();
            if !client.listed {
                client.listed = true;
                self.ready.push(slot);
            }
        }
        if event.is_writable()
            && let Some(client) = self.get(slot)
            && std::mem::take(&mut client.blocked)
        {
            core.sessions.touch(slot);
        }
    }

    /// True if a client may be read at once.
    pub(super) fn has_ready(&self, core: &Core) -> bool {
        !self.ready.is_empty() || !core.sessions.resumed.is_empty()
    }

    /// Reads each ready client once.
    pub(super) fn read(&mut self, core: &mut Core, buffer: &mut [u8]) {
        let mut ready = std::mem::replace(&mut self.ready, std::mem::take(&mut self.spare));
        for slot in ready.drain(..) {
            if let Some(client) = self.get(slot) {
                client.listed = false;
                self.read_one(slot, core, buffer);
            }
        }
        self.spare = ready;
    }

    fn read_one(&mut self, slot: u32, core: &mut Core, buffer: &mut [u8]) {
        let Some(client) = self.sockets.get_mut(slot as usize).and_then(Option::as_mut) else {
            return;
        };
        let Some(session) = core.sessions.get_mut(slot) else {
            return;
        };
        match session.pause {
            Pause::None => {}
            // What it sends after QUIT or nonsense is nobody's.
            Pause::Leaving => {
                client.readable = false;
                if client.read_closed {
                    core.client_hung_up(slot);
                }
                return;
            }
            // What it waits for is given up when it goes away, as Redis does it.
            Pause::Blocked => {
                if client.read_closed {
                    core.sessions.doom(slot, CloseReason::Done);
                }
                return;
            }
            // Stays readable; resumed when there is room.
            Pause::Full | Pause::Stalled | Pause::Quiet | Pause::Frozen => return,
        }
        let mut input = std::mem::take(&mut session.state.input);
        let carried = if input.len() <= CARRY_BYTES_MAX {
            input.len()
        } else {
            0
        };
        buffer[..carried].copy_from_slice(&input[..carried]);
        let read = client.socket.read(&mut buffer[carried..]);
        let count = match read {
            Ok(0) => {
                client.readable = false;
                core.sessions.pool.give(input);
                core.client_hung_up(slot);
                return;
            }
            Ok(count) => count,
            Err(error) => {
                session.state.input = input;
                self.read_failed(slot, &error, core);
                return;
            }
        };
        let short = carried + count < buffer.len();
        client.readable = !short || client.read_closed;
        if client.readable {
            client.listed = true;
            self.ready.push(slot);
        }
        if carried < input.len() {
            input.extend_from_slice(&buffer[..count]);
            Self::parse_kept(slot, input, core);
        } else {
            input.clear();
            let all = &buffer[..carried + count];
            let used = core.client_bytes(slot, all);
            Self::keep(slot, input, &all[used..], core);
        }
    }

    fn read_failed(&mut self, slot: u32, error: &io::Error, core: &mut Core) {
        let Some(client) = self.get(slot) else { return };
        match error.kind() {
            io::ErrorKind::WouldBlock => client.readable = false,
            io::ErrorKind::Interrupted => {
                client.listed = true;
                self.ready.push(slot);
            }
            _ => {
                client.readable = false;
                core.sessions.doom(slot, CloseReason::Done);
            }
        }
    }

    /// Parses what a client had kept, in place.
    fn parse_kept(slot: u32, mut input: Vec<u8>, core: &mut Core) {
        let used = core.client_bytes(slot, &input);
        if used == input.len() {
            core.sessions.pool.give(input);
        } else if let Some(session) = core.sessions.get_mut(slot) {
            input.drain(..used);
            session.state.input = input;
        }
    }

    /// Keeps what is not used yet; a buffer only for those that need one.
    fn keep(slot: u32, mut spare: Vec<u8>, rest: &[u8], core: &mut Core) {
        if rest.is_empty() {
            core.sessions.pool.give(spare);
            return;
        }
        if spare.capacity() == 0 {
            spare = core.sessions.pool.take();
        }
        spare.extend_from_slice(rest);
        if let Some(session) = core.sessions.get_mut(slot) {
            session.state.input = spare;
        }
    }

    /// Clients that may go on: first with what they had sent already, then by reading again.
    pub(super) fn resume(&mut self, core: &mut Core) {
        let mut resumed = std::mem::take(&mut core.sessions.resumed);
        for (slot, generation) in resumed.drain(..) {
            let Some(session) = core.sessions.get_same(slot, generation) else {
                continue;
            };
            let input = std::mem::take(&mut session.state.input);
            if !input.is_empty() {
                Self::parse_kept(slot, input, core);
            }
            if let Some(client) = self.get(slot)
                && client.readable
                && !client.listed
            {
                client.listed = true;
                self.ready.push(slot);
            }
        }
        if core.sessions.resumed.is_empty() {
            core.sessions.resumed = resumed; // keeps its memory
        }
    }

    /// Sends once to each touched client.
    pub(super) fn send(&mut self, core: &mut Core) {
        let mut touched = std::mem::take(&mut core.sessions.touched);
        for slot in touched.drain(..) {
            let Some(session) = core.sessions.get_mut(slot) else {
                continue;
            };
            session.touched = false;
            let Some(client) = self.get(slot) else {
                continue;
            };
            if !client.blocked && session.unsent() > 0 {
                let unsent = &session.state.output[session.sent..];
                match send(&mut client.socket, unsent) {
                    Ok(count) => {
                        client.blocked = count < unsent.len();
                        core.sessions.mark_sent(slot, count);
                    }
                    Err(_) => core.sessions.doom(slot, CloseReason::Done),
                }
            }
            if core.sessions.is_done(slot) {
                core.sessions.doom(slot, CloseReason::Done);
            }
        }
        if core.sessions.touched.is_empty() {
            core.sessions.touched = touched;
        }
    }

    /// Closes those that must go. Returns how many that were.
    pub(super) fn close_doomed(&mut self, core: &mut Core, registry: &Registry) -> usize {
        let mut closed = 0;
        while let Some((slot, generation, reason)) = core.sessions.doomed.pop() {
            if core.sessions.get_same(slot, generation).is_none() {
                continue;
            }
            core.counters.closed_backlog += u64::from(reason == CloseReason::Backlog);
            // One that is awaited from another process has its place, and no socket yet.
            let socket = self.sockets.get_mut(slot as usize);
            if let Some(mut client) = socket.and_then(Option::take) {
                deregister(registry, &mut client.socket);
            }
            core.close_client(slot);
            closed += 1;
        }
        closed
    }

    /// The process ends: what was asked is answered, nothing more is taken.
    pub(super) fn stop_reading(&mut self, core: &mut Core) {
        for slot in 0..self.sockets.len() as u32 {
            if self.sockets[slot as usize].is_some() {
                core.client_hung_up(slot);
            }
        }
    }
}

impl Outlet for Clients {
    fn send_now(&mut self, slot: u32, bytes: &[u8]) -> usize {
        let Some(client) = self.get(slot) else {
            return 0;
        };
        if client.blocked {
            return 0;
        }
        match send(&mut client.socket, bytes) {
            Ok(count) => {
                client.blocked = count < bytes.len();
                count
            }
            // Not blocked: it shows again when the rest is sent, and closes the client. No event
            // would ever unblock a broken socket.
            Err(_) => 0,
        }
    }
}

/// Sends what the socket takes now.
fn send(socket: &mut TcpStream, bytes: &[u8]) -> io::Result<usize> {
    loop {
        match socket.write(bytes) {
            Ok(count) => return Ok(count),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(0),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}
