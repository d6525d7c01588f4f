//! Messages with descriptors over a unix socket, between two processes of one user.
//!
//! Invariant: a message arrives whole with exactly the descriptors that were sent with it, or the
//! conversation is over. Nothing is read beyond the end of a message, so that descriptors never join
//! another one.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use prost::Message;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use rustix::process::PidfdFlags;

/// Descriptors of one message: the kernel takes 253.
pub(super) const FDS_MAX: usize = 250;
/// Bytes of one message: a batch of [`super::giver::BATCH_BYTES`] and one client more, the largest
/// that travels.
pub(super) const MESSAGE_BYTES_MAX: usize = 64 * 1024 * 1024;
const HEADER_BYTES: usize = 4;
/// A look at what is there already.
const LOOK: Duration = Duration::from_millis(1);
/// What a socket may hold unread on systems that nobody has tuned; the kernel allows no more.
const ROOM_BYTES: usize = 212_992;

/// Why a conversation ended.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    #[error("the other process is gone")]
    Gone,
    #[error("the other process did not answer in time")]
    Late,
    #[error("the other process said what this release does not understand: {0}")]
    Nonsense(&'static str),
    #[error("use the socket of the hand-over")]
    Io(#[from] io::Error),
}

/// A message on its way: there may be keys in it, so nothing is left of it. Not byte by byte, as
/// `zeroize` does it: clients wait for messages of some megabytes.
struct Wiped(Vec<u8>);

impl Drop for Wiped {
    fn drop(&mut self) {
        self.0.fill(0);
        std::hint::black_box(&self.0); // or the compiler may leave it out
    }
}

/// One end of a conversation.
#[derive(Debug)]
pub(super) struct Wire {
    stream: UnixStream,
    /// Of the other process; it becomes readable when that has ended.
    peer: OwnedFd,
}

impl Wire {
    /// Takes a connected socket, if the other process is of this user.
    pub(super) fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(false)?;
        let peer = rustix::net::sockopt::socket_peercred(&stream)?;
        if peer.uid != rustix::process::geteuid() {
            let text = "the other process belongs to another user";
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, text));
        }
        let peer = rustix::process::pidfd_open(peer.pid, PidfdFlags::empty())?;
        Ok(Self { stream, peer })
    }

    /// As if it were the process of this descriptor that is talked to.
    #[cfg(test)]
    pub(super) fn with_peer(stream: UnixStream, peer: OwnedFd) -> Self {
        Self { stream, peer }
    }

    /// Sends a message with descriptors, all within `limit`.
    pub(super) fn send<M: Message>(
        &self,
        message: &M,
        fds: &[BorrowedFd<'_>],
        limit: Duration,
    ) -> Result<(), WireError> {
        let mut wiped = Wiped(Vec::with_capacity(HEADER_BYTES + message.encoded_len()));
        let bytes = &mut wiped.0;
        bytes.resize(HEADER_BYTES, 0);
        message
            .encode(bytes)
            .map_err(|_| WireError::Nonsense("a message without room"))?;
        let len = bytes.len() - HEADER_BYTES;
        if len > MESSAGE_BYTES_MAX || fds.len() > FDS_MAX {
            return Err(WireError::Nonsense("a message over the bound"));
        }
        bytes[..HEADER_BYTES].copy_from_slice(&(len as u32).to_be_bytes());
        let until = Instant::now() + limit;
        let mut sent = 0;
        while sent < bytes.len() {
            self.stream.set_write_timeout(Some(rest_of(until)?))?;
            let fds = if sent == 0 { fds } else { &[] };
            sent += self.send_some(&bytes[sent..], fds)?;
        }
        Ok(())
    }

    fn send_some(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<usize, WireError> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(WireError::Nonsense("descriptors over the bound"));
        }
        let bytes = [IoSlice::new(bytes)];
        match rustix::net::sendmsg(&self.stream, &bytes, &mut control, SendFlags::NOSIGNAL) {
            Ok(count) => Ok(count),
            Err(rustix::io::Errno::INTR) => Ok(0),
            Err(rustix::io::Errno::AGAIN) => Err(WireError::Late),
            Err(rustix::io::Errno::PIPE | rustix::io::Errno::CONNRESET) => Err(WireError::Gone),
            Err(error) => Err(WireError::Io(error.into())),
        }
    }

    /// The next message, all of it within `limit`, or there by then.
    pub(super) fn receive<M: Message + Default>(
        &self,
        limit: Duration,
    ) -> Result<(M, Vec<OwnedFd>), WireError> {
        let until = Instant::now() + limit;
        let mut fds = Vec::new();
        let mut header = [0; HEADER_BYTES];
        self.fill(&mut header, &mut fds, until)?;
        let len = u32::from_be_bytes(header) as usize;
        if len > MESSAGE_BYTES_MAX {
            return Err(WireError::Nonsense("a message over the bound"));
        }
        let mut bytes = Wiped(vec![0; len]);
        self.fill(&mut bytes.0, &mut fds, until)?;
        let message = M::decode(&bytes.0[..]).map_err(|_| WireError::Nonsense("no message"))?;
        Ok((message, fds))
    }

    fn fill(
        &self,
        bytes: &mut [u8],
        fds: &mut Vec<OwnedFd>,
        until: Instant,
    ) -> Result<(), WireError> {
        let mut filled = 0;
        while filled < bytes.len() {
            // What is there is taken however late it is: a word that was written counts, and a thread
            // that found no processor in time must not leave half of one.
            let rest = rest_of(until).unwrap_or(LOOK);
            self.stream.set_read_timeout(Some(rest))?;
            filled += self.receive_some(&mut bytes[filled..], fds)?;
            if fds.len() > FDS_MAX {
                return Err(WireError::Nonsense("descriptors over the bound"));
            }
        }
        Ok(())
    }

    fn receive_some(&self, bytes: &mut [u8], fds: &mut Vec<OwnedFd>) -> Result<usize, WireError> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut slices = [IoSliceMut::new(bytes)];
        let flags = RecvFlags::CMSG_CLOEXEC;
        let received = match rustix::net::recvmsg(&self.stream, &mut slices, &mut control, flags) {
            Ok(received) => received,
            Err(rustix::io::Errno::INTR) => return Ok(0),
            Err(rustix::io::Errno::AGAIN) => return Err(WireError::Late),
            Err(rustix::io::Errno::CONNRESET) => return Err(WireError::Gone),
            Err(error) => return Err(WireError::Io(error.into())),
        };
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(received) = message {
                fds.extend(received);
            }
        }
        if received.flags.contains(ReturnFlags::CTRUNC) {
            return Err(WireError::Nonsense(
                "descriptors were lost; is the limit of open files of this process too low?",
            ));
        }
        if received.bytes == 0 {
            return Err(WireError::Gone);
        }
        Ok(received.bytes)
    }

    /// From now on the other process can write nothing more; what it wrote before is still read.
    pub(super) fn hear_no_more(&self) -> io::Result<()> {
        self.stream.shutdown(std::net::Shutdown::Read)
    }

    /// Makes sure that a short message finds room, however much the other side has left unread.
    pub(super) fn make_room(&self) {
        // The kernel doubles what it is told, and a conversation begins with half of this.
        if let Err(error) = socket2::SockRef::from(&self.stream).set_send_buffer_size(ROOM_BYTES) {
            tracing::debug!(%error, "the last words of a conversation may find no room");
        }
    }

    /// Ends the conversation; whether the other process lives can still be seen.
    pub(super) fn hang_up(&self) {
        // An error means that it was over already.
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
    }

    /// True if the other process ends within `limit`.
    pub(super) fn peer_ends(&self, limit: Duration) -> bool {
        self.wait(self.peer.as_fd(), limit)
    }

    /// True if there is something to receive, or nothing ever again, within `limit`.
    pub(super) fn has_news(&self, limit: Duration) -> bool {
        self.wait(self.stream.as_fd(), limit)
    }

    fn wait(&self, fd: BorrowedFd<'_>, limit: Duration) -> bool {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let until = Instant::now() + limit;
        loop {
            let rest = until.saturating_duration_since(Instant::now());
            let rest = Timespec {
                tv_sec: rest.as_secs() as i64,
                tv_nsec: i64::from(rest.subsec_nanos()),
            };
            let mut fds = [PollFd::new(&fd, PollFlags::IN)];
            match poll(&mut fds, Some(&rest)) {
                Err(rustix::io::Errno::INTR) => {}
                Ok(found) => return found > 0,
                Err(_) => return false,
            }
        }
    }
}

fn rest_of(until: Instant) -> Result<Duration, WireError> {
    let rest = until.saturating_duration_since(Instant::now());
    if rest.is_zero() {
        Err(WireError::Late)
    } else {
        Ok(rest)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;
    use std::net::{TcpListener, TcpStream};

    use slotmesh_proto::handover::v1::Refused;

    use super::*;

    const LIMIT: Duration = Duration::from_secs(5);

    fn pair() -> (Wire, Wire) {
        let (a, b) = UnixStream::pair().unwrap();
        (Wire::new(a).unwrap(), Wire::new(b).unwrap())
    }

    fn text(len: usize) -> Refused {
        Refused {
            reason: "x".repeat(len),
        }
    }

    #[test]
    fn messages_keep_their_own_descriptors_however_long_they_are() {
        let (here, there) = pair();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (theirs, _) = listener.accept().unwrap();
        let sender = std::thread::spawn(move || {
            here.send(&text(3), &[], LIMIT).unwrap();
            let fds = vec![theirs.as_fd(); FDS_MAX];
            here.send(&text(5_000_000), &fds, LIMIT).unwrap();
            here.send(&text(0), &[theirs.as_fd()], LIMIT).unwrap();
        });
        for (len, count) in [(3, 0), (5_000_000, FDS_MAX), (0, 1)] {
            let (message, fds): (Refused, _) = there.receive(LIMIT).unwrap();
            assert_eq!((message.reason.len(), fds.len()), (len, count));
        }
        sender.join().unwrap();
        // The last copy is closed, so the other end sees the end.
        assert_eq!(ours.read(&mut [0]).unwrap(), 0);
    }

    #[test]
    fn what_was_written_before_the_ear_was_closed_is_heard_and_nothing_after_it() {
        let (here, there) = pair();
        there.send(&text(1), &[], LIMIT).unwrap();
        here.hear_no_more().unwrap();
        assert!(matches!(
            there.send(&text(2), &[], LIMIT),
            Err(WireError::Gone)
        ));
        let (heard, _): (Refused, _) = here.receive(LIMIT).unwrap();
        assert_eq!(heard.reason.len(), 1);
        assert!(matches!(
            here.receive::<Refused>(LIMIT),
            Err(WireError::Gone)
        ));
        assert!(
            !here.peer_ends(Duration::from_millis(1)),
            "it is this process"
        );
    }

    #[test]
    fn a_word_that_is_there_is_heard_however_late_it_is_read() {
        let (here, there) = pair();
        there.send(&text(70_000), &[], LIMIT).unwrap();
        let (heard, _): (Refused, _) = here.receive(Duration::ZERO).unwrap();
        assert_eq!(heard.reason.len(), 70_000);
    }

    #[test]
    fn a_silent_peer_and_a_length_over_the_bound_end_the_conversation() {
        let (here, there) = pair();
        let late = here.receive::<Refused>(Duration::from_millis(20));
        assert!(matches!(late, Err(WireError::Late)), "{late:?}");
        rustix::io::write(&there.stream, &u32::MAX.to_be_bytes()).unwrap();
        let bound = here.receive::<Refused>(LIMIT);
        assert!(matches!(bound, Err(WireError::Nonsense(_))), "{bound:?}");
    }
}
