//! The sockets of a worker's clients: reads them, sends to them, closes them.

use std::collections::VecDeque;
use std::io::{self, Read as _};

use mio::event::Event;
use mio::net::TcpStream;
use mio::{Interest, Registry, Token};

use super::{Accepted, deregister};
use crate::core::Core;
use crate::core::client::Pause;
use crate::core::sessions::{CloseReason, Outlet};
use crate::tls::{self, GREETING_LIMIT, Tls, write};

/// A longer beginning of a command stays where it is instead of being copied to the read buffer.
const CARRY_BYTES_MAX: usize = 64 * 1024;

/// Handshakes that may go on in a turn: with an RSA key each takes a millisecond, and all other clients
/// of the worker wait for it.
const GREETINGS: usize = 4;

/// The socket of a client that is at no worker, and what it has of TLS.
pub(super) type Taken = (TcpStream, Option<Box<Tls>>);

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
    /// It was sent the last byte.
    ended: bool,
    /// What a client with TLS has of it, and one that may become one.
    tls: Option<Box<Tls>>,
}

impl ClientSocket {
    /// Sends what the socket takes now; returns how much of it need not be given again.
    fn send(&mut self, bytes: &[u8], scratch: &mut Vec<u8>) -> io::Result<usize> {
        let Some(tls) = &mut self.tls else {
            let count = write(&mut self.socket, bytes)?;
            self.blocked = count < bytes.len();
            return Ok(count);
        };
        let count = tls.send(&mut self.socket, bytes, scratch)?;
        self.blocked = tls.has_unsent() || count < bytes.len();
        Ok(count)
    }

    /// Something is sealed for the client that was not sent.
    fn has_sealed(&self) -> bool {
        self.tls.as_ref().is_some_and(|tls| tls.has_unsent())
    }
}

/// See the module. Indexed by the client's slot.
#[derive(Debug, Default)]
pub(super) struct Clients {
    sockets: Vec<Option<ClientSocket>>,
    ready: Vec<u32>,
    spare: Vec<u32>,
    /// Sealed replies on their way to a socket.
    scratch: Vec<u8>,
    /// Clients whose handshake began: slot, generation, and until when it may last. The oldest first.
    greetings: VecDeque<(u32, u32, u64)>,
    /// Handshakes that went on in this turn.
    greeted: usize,
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
            session.encrypted = new.tls.as_ref().is_some_and(|tls| tls.is_open());
            session.sealed = new.tls.as_ref().is_some_and(|tls| tls.has_unsent());
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
        self.keep_socket(slot, socket, new.tls);
        Some(slot)
    }

    fn keep_socket(&mut self, slot: u32, socket: TcpStream, tls: Option<Box<Tls>>) {
        let at = slot as usize;
        if self.sockets.len() <= at {
            self.sockets.resize_with(at + 1, || None);
        }
        self.sockets[at] = Some(ClientSocket {
            socket,
            readable: false,
            read_closed: false,
            // What was sealed elsewhere is sent when the socket says that it takes it.
            blocked: tls.as_ref().is_some_and(|tls| tls.has_unsent()),
            listed: false,
            ended: false,
            tls,
        });
    }

    /// True if the client's socket is here, and all that it has can be told to a process that knows
    /// schemas up to this.
    pub(super) fn may_go(&self, slot: u32, schema_max: u32) -> bool {
        let client = self.sockets.get(slot as usize).and_then(Option::as_ref);
        let may = |tls: &Tls| schema_max >= tls::SCHEMA && tls.may_travel();
        client.is_some_and(|client| client.tls.as_deref().is_none_or(may))
    }

    /// Takes the socket of a client away: it is neither read nor written until it comes back.
    pub(super) fn take_out(&mut self, slot: u32, registry: &Registry) -> Option<Taken> {
        let mut client = self.sockets.get_mut(slot as usize)?.take()?;
        // The registration would live on with the other process's copy.
        deregister(registry, &mut client.socket);
        Some((client.socket, client.tls))
    }

    /// A socket that was taken out comes back. What happened meanwhile is told by its registration.
    pub(super) fn put_back(
        &mut self,
        slot: u32,
        (mut socket, tls): Taken,
        core: &mut Core,
        registry: &Registry,
    ) {
        let interest = Interest::READABLE | Interest::WRITABLE;
        if let Err(error) = registry.register(&mut socket, Token(slot as usize), interest) {
            tracing::warn!(%error, "a client cannot be watched");
            return core.sessions.doom(slot, CloseReason::Done);
        }
        self.keep_socket(slot, socket, tls);
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
        self.greeted = 0;
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
                // Unread bytes would make of the end a reset, and lose what is still on its way.
                let more = client.ended && matches!(client.socket.read(buffer), Ok(1..));
                client.readable = more;
                if more {
                    client.listed = true;
                    self.ready.push(slot);
                } else if client.read_closed {
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
        let input = std::mem::take(&mut session.state.input);
        let carried = if input.len() <= CARRY_BYTES_MAX {
            input.len()
        } else {
            0
        };
        buffer[..carried].copy_from_slice(&input[..carried]);
        if client.tls.is_some() {
            return self.read_tls(slot, input, carried, core, buffer);
        }
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
        Self::parse(slot, input, &buffer[..carried + count], carried, core);
    }

    /// As [`Clients::read_one`], from where the socket is read.
    fn read_tls(
        &mut self,
        slot: u32,
        input: Vec<u8>,
        carried: usize,
        core: &mut Core,
        buffer: &mut [u8],
    ) {
        let now_us = core.now_us();
        let Some(client) = self.sockets.get_mut(slot as usize).and_then(Option::as_mut) else {
            return;
        };
        let (Some(tls), Some(session)) = (&mut client.tls, core.sessions.get_mut(slot)) else {
            return;
        };
        let greets = !tls.is_open();
        if greets && self.greeted >= GREETINGS {
            session.state.input = input;
            client.listed = true;
            return self.ready.push(slot);
        }
        let read = tls.read(&mut client.socket, &mut buffer[carried..]);
        if read.is_ok() {
            session.heard_us = now_us; // half a record is a sign of life, too
        }
        let is_plain = read.as_ref().is_ok_and(|got| got.is_plain);
        self.greeted += usize::from(greets && !is_plain);
        client.blocked |= tls.has_unsent();
        session.encrypted = tls.is_open();
        session.sealed = tls.has_unsent();
        let got = match read {
            Ok(got) => got,
            Err(error) => {
                session.state.input = input;
                if error.kind() == io::ErrorKind::InvalidData {
                    tracing::debug!(id = session.state.id, %error, "a client's TLS ends");
                }
                return self.read_failed(slot, &error, core);
            }
        };
        if got.is_plain {
            client.tls = None;
        }
        // An end behind requests is met again at the next read, as that of a plain client is: not all of
        // them may be taken at once.
        client.read_closed |= got.ended;
        client.readable = got.more || client.read_closed;
        let is_over = got.ended && got.bytes == 0;
        if client.readable && !is_over {
            client.listed = true;
            self.ready.push(slot);
        }
        if got.begins {
            let until_us = now_us + GREETING_LIMIT.as_micros() as u64;
            (self.greetings).push_back((slot, session.generation, until_us));
        }
        if got.bytes > 0 {
            let all = &buffer[..carried + got.bytes];
            Self::parse(slot, input, all, carried, core);
        } else if let Some(session) = core.sessions.get_mut(slot) {
            session.state.input = input;
        }
        if is_over {
            if let Some(client) = self.get(slot) {
                client.readable = false;
            }
            core.client_hung_up(slot);
        }
    }

    /// When a handshake is to be looked at, on the worker's clock.
    pub(super) fn greeting_due_us(&self) -> Option<u64> {
        self.greetings.front().map(|(_, _, until_us)| *until_us)
    }

    /// Closes those whose handshake takes too long.
    pub(super) fn end_greetings(&mut self, core: &mut Core) {
        while let Some(&(slot, generation, until_us)) = self.greetings.front()
            && until_us <= core.now_us()
        {
            self.greetings.pop_front();
            let client = self.get(slot).and_then(|client| client.tls.as_ref());
            let greets = client.is_some_and(|tls| tls.is_greeting());
            if greets && core.sessions.get_same(slot, generation).is_some() {
                core.sessions.doom(slot, CloseReason::Done);
            }
        }
    }

    /// Parses what was read: `all` begins with what was kept, if it was `carried` there.
    fn parse(slot: u32, mut input: Vec<u8>, all: &[u8], carried: usize, core: &mut Core) {
        if carried < input.len() {
            input.extend_from_slice(all);
            Self::parse_kept(slot, input, core);
        } else {
            input.clear();
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
            let client = self.sockets.get_mut(slot as usize);
            let Some(client) = client.and_then(Option::as_mut) else {
                continue;
            };
            if !client.blocked && (session.unsent() > 0 || client.has_sealed()) {
                let unsent = &session.state.output[session.sent..];
                match client.send(unsent, &mut self.scratch) {
                    Ok(0) => {}
                    Ok(count) => core.sessions.mark_sent(slot, count),
                    Err(_) => core.sessions.doom(slot, CloseReason::Done),
                }
            }
            if client.tls.is_some()
                && let Some(session) = core.sessions.get_mut(slot)
            {
                session.sealed = client.has_sealed();
            }
            if core.sessions.is_done(slot) {
                core.sessions.doom(slot, CloseReason::Done);
            }
        }
        if core.sessions.touched.is_empty() {
            core.sessions.touched = touched;
        }
    }

    /// Sends a client the last byte. False: it has just sent something, or is gone.
    pub(super) fn end(&mut self, slot: u32, core: &mut Core) -> bool {
        let Some(client) = self.get(slot) else {
            return false;
        };
        match client.socket.peek(&mut [0]) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            // Its event is to come, or it is on the list.
            _ => return false,
        }
        let greets = client.tls.as_ref().is_some_and(|tls| tls.is_greeting());
        let is_sending = client.tls.as_ref().is_some_and(|tls| tls.has_partial());
        if greets || is_sending || client.has_sealed() {
            return false;
        }
        if let Some(tls) = &mut client.tls {
            tls.farewell(&mut client.socket);
        }
        client.ended = client.socket.shutdown(std::net::Shutdown::Write).is_ok();
        if !client.ended {
            core.sessions.doom(slot, CloseReason::Done);
        }
        client.ended
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
                if let Some(tls) = &mut client.tls {
                    tls.farewell(&mut client.socket);
                }
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
        let client = self.sockets.get_mut(slot as usize);
        let Some(client) = client.and_then(Option::as_mut) else {
            return 0;
        };
        if client.blocked {
            return 0;
        }
        // After an error it is not blocked: that shows again when the rest is sent, and closes the
        // client. No event would ever unblock a broken socket.
        client.send(bytes, &mut self.scratch).unwrap_or(0)
    }
}
