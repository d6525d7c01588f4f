//! Sessions between two ends of ours, in memory: cut at every byte, told to another process at every
//! byte, changed on their way. What real clients say to it is in `tests/tls.rs`.

use std::io::{self, Read, Write};

use zeroize::Zeroizing;

use super::records::{Opened, Records};
use super::secrets::{Broken, DATA, Direction, HANDSHAKE, HEADER, Suite};
use super::socket::{PIECE, Stage, Tls};

const SUITES: [u16; 6] = [0x1301, 0x1302, 0x1303, 0xc02b, 0xc030, 0xcca9];

fn direction(suite: u16, byte: u8, seq: u64) -> Direction {
    let suite = Suite::of(suite).unwrap();
    let lens = [28, 32, 44, 48];
    let made = lens
        .map(|len| Direction::new(suite, Zeroizing::new(vec![byte; len]), seq))
        .into_iter();
    made.flatten().next().unwrap()
}

/// The two ends of a session whose next records have this number.
fn ends(suite: u16, seq: u64) -> (Records, Records) {
    let ours = Records::new(direction(suite, 1, seq), direction(suite, 2, seq));
    let theirs = Records::new(direction(suite, 2, seq), direction(suite, 1, seq));
    (ours, theirs)
}

/// Our end as a client's socket has it, and theirs.
fn session(suite: u16, seq: u64) -> (Tls, Records) {
    let (ours, theirs) = ends(suite, seq);
    (Tls::of(Stage::Open(Box::new(ours))), theirs)
}

fn open(records: &mut Records, bytes: &[u8]) -> (Result<Opened, Broken>, Vec<u8>, Vec<u8>) {
    let mut buffer = [&records.partial, bytes].concat();
    let mut out = Vec::new();
    let opened = records.open(&mut buffer, &mut out);
    if let Ok(opened) = opened {
        buffer.truncate(opened.bytes);
    }
    (opened, buffer, out)
}

/// A socket from which this can be read, and that takes so much.
struct Pipe {
    input: Vec<u8>,
    output: Vec<u8>,
    room: usize,
}

impl Pipe {
    fn with_room(room: usize) -> Self {
        let (input, output) = (Vec::new(), Vec::new());
        Self {
            input,
            output,
            room,
        }
    }
}

impl Read for Pipe {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.input.len().min(buffer.len());
        buffer[..count].copy_from_slice(&self.input[..count]);
        self.input.drain(..count);
        Ok(count)
    }
}

impl Write for Pipe {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = bytes.len().min(self.room);
        if count == 0 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        self.room -= count;
        self.output.extend_from_slice(&bytes[..count]);
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A new key of this end; `wants` 1: the other one is to change its own, too.
fn change_key(records: &mut Records, wants: u8, out: &mut Vec<u8>) {
    let update = [24, 0, 0, 1, wants];
    records.tx.seal(HANDSHAKE, &update, out).unwrap();
    assert!(records.tx.change_key());
}

/// As if another process had taken the connection.
fn passed(tls: &Tls) -> Tls {
    let told = tls.to_message();
    *Tls::read_message(told, None).unwrap().unwrap()
}

#[test]
fn records_cut_at_every_byte_are_opened_whole_in_every_suite() {
    for suite in SUITES {
        let (_, mut theirs) = ends(suite, 0);
        let text = b"*1\r\n$4\r\nPING\r\n".repeat(3);
        let mut sealed = Vec::new();
        for part in text.chunks(9) {
            theirs.seal(part, &mut sealed).unwrap();
        }
        for cut in 0..=sealed.len() {
            let (mut ours, _) = ends(suite, 0);
            let mut got = Vec::new();
            for part in [&sealed[..cut], &sealed[cut..]] {
                let (opened, plain, out) = open(&mut ours, part);
                assert!(opened.is_ok() && out.is_empty(), "{opened:?}");
                got.extend(plain);
            }
            assert_eq!(got, text, "suite {suite:x}, cut at {cut}");
            assert_eq!(ours.partial.capacity(), 0);
        }
    }
}

#[test]
fn a_session_goes_on_in_another_process_at_every_byte_of_both_directions() {
    for suite in SUITES {
        let (mut tls, mut theirs) = session(suite, 7);
        let mut input = Vec::new();
        theirs.seal(b"question", &mut input).unwrap();
        let mut pipe = Pipe::with_room(0);
        let (mut asked, mut buffer) = (Vec::new(), vec![0; 1024]);
        for byte in input {
            pipe.input = vec![byte];
            let got = tls.read(&mut pipe, &mut buffer).unwrap();
            asked.extend_from_slice(&buffer[..got.bytes]);
            tls = passed(&tls);
        }
        assert_eq!(asked, b"question");
        let mut unsent: &[u8] = b"answer";
        while !unsent.is_empty() || tls.has_unsent() {
            pipe.room = 1;
            let taken = tls.send(&mut pipe, unsent, &mut Vec::new()).unwrap();
            unsent = &unsent[taken..];
            tls = passed(&tls);
        }
        let (_, answer, _) = open(&mut theirs, &pipe.output);
        assert_eq!(answer, b"answer", "suite {suite:x}");
    }
}

#[test]
fn both_sides_change_their_keys_as_often_as_they_like_and_may_be_passed_between() {
    for suite in [0x1301, 0x1302, 0x1303] {
        let (mut tls, mut theirs) = session(suite, 0);
        let mut buffer = vec![0; 1024];
        for round in 0..5 {
            let mut pipe = Pipe::with_room(1024);
            change_key(&mut theirs, round % 2, &mut pipe.input);
            theirs.seal(b"next", &mut pipe.input).unwrap();
            let got = tls.read(&mut pipe, &mut buffer).unwrap();
            assert_eq!(&buffer[..got.bytes], b"next");
            tls = passed(&tls);
            tls.send(&mut pipe, b"reply", &mut Vec::new()).unwrap();
            let (opened, reply, _) = open(&mut theirs, &pipe.output);
            assert!(opened.is_ok(), "{opened:?}");
            assert_eq!(reply, b"reply");
        }
    }
}

#[test]
fn a_key_that_is_worn_is_changed_before_the_next_record() {
    let (mut ours, mut theirs) = ends(0x1301, (1 << 23) - 1);
    let mut sealed = Vec::new();
    for _ in 0..3 {
        ours.seal(b"x", &mut sealed).unwrap();
    }
    let (opened, plain, _) = open(&mut theirs, &sealed);
    assert_eq!((opened.map(|o| o.bytes), &plain[..]), (Ok(3), &b"xxx"[..]));
    assert_eq!((ours.tx.seq(), theirs.rx.seq()), (2, 2));
}

#[test]
fn what_is_changed_repeated_or_out_of_place_ends_the_session_with_an_alert() {
    for suite in SUITES {
        let sealed = |kind, plain: &[u8]| {
            let (_, mut theirs) = ends(suite, 0);
            let mut sealed = Vec::new();
            theirs.tx.seal(kind, plain, &mut sealed).unwrap();
            sealed
        };
        let good = sealed(DATA, b"PING\r\n");
        for at in HEADER..good.len() {
            let (mut ours, _) = ends(suite, 0);
            let mut bad = good.clone();
            bad[at] ^= 1;
            let (opened, _, out) = open(&mut ours, &bad);
            assert_eq!(opened, Err(Broken::Forged), "byte {at}");
            assert!(!out.is_empty(), "an alert");
        }
        let refused = [
            ([&good[..], &good[..]].concat(), Broken::Forged),
            (sealed(HANDSHAKE, &[1, 0, 0, 0]), Broken::OutOfPlace),
            (sealed(HANDSHAKE, &[24, 0, 0, 1, 2]), Broken::OutOfPlace),
            (sealed(20, &[1]), Broken::OutOfPlace),
            (sealed(21, &[2, 40]), Broken::Alert(40)),
            (b"GET k\r\n".to_vec(), Broken::Malformed),
            (vec![DATA, 3, 3, 0xff, 0xff], Broken::Large),
            (vec![DATA, 3, 3, 0, 1, 0], Broken::Malformed),
        ];
        for (bytes, error) in refused {
            let (mut ours, _) = ends(suite, 0);
            assert_eq!(open(&mut ours, &bytes).0, Err(error), "suite {suite:x}");
        }
        let (mut ours, _) = ends(suite, 0);
        let (opened, _, _) = open(&mut ours, &sealed(21, &[1, 0]));
        assert!(opened.unwrap().ended, "close_notify");
    }
}

#[test]
fn a_client_that_changes_its_key_and_never_reads_is_closed() {
    let (mut tls, mut theirs) = session(0x1301, 0);
    let mut pipe = Pipe::with_room(0);
    let mut buffer = vec![0; 256 * 1024];
    let closed = (0..6000).any(|_| {
        change_key(&mut theirs, 1, &mut pipe.input);
        theirs.seal(b"x", &mut pipe.input).unwrap();
        tls.read(&mut pipe, &mut buffer).is_err()
    });
    assert!(closed);
    assert!(tls.bytes_len() < 2 * PIECE + 1024, "{}", tls.bytes_len());
}

#[test]
fn a_client_that_changes_its_key_and_says_nothing_is_closed() {
    let mut input = Vec::new();
    let (mut ours, mut theirs) = ends(0x1301, 0);
    for _ in 0..3 {
        (0..32).for_each(|_| change_key(&mut theirs, 0, &mut input));
        theirs.seal(b"x", &mut input).unwrap();
    }
    let (opened, plain, _) = open(&mut ours, &input);
    assert_eq!((opened.map(|o| o.bytes), &plain[..]), (Ok(3), &b"xxx"[..]));
    input.clear();
    (0..33).for_each(|_| change_key(&mut theirs, 0, &mut input));
    assert_eq!(open(&mut ours, &input).0, Err(Broken::Restless));
}

#[test]
fn a_client_whose_reply_waits_may_ask_for_new_keys() {
    let (mut tls, mut theirs) = session(0x1301, 0);
    let mut pipe = Pipe::with_room(0);
    let reply = vec![b'r'; PIECE];
    let taken = tls.send(&mut pipe, &reply, &mut Vec::new()).unwrap();
    assert_eq!(taken, PIECE, "sealed");
    change_key(&mut theirs, 1, &mut pipe.input);
    theirs.seal(b"x", &mut pipe.input).unwrap();
    pipe.room = 1000; // in the midst of a record
    let got = tls.read(&mut pipe, &mut vec![0; 1024]).unwrap();
    assert_eq!(got.bytes, 1);
    change_key(&mut theirs, 1, &mut pipe.input);
    pipe.room = 0;
    tls.read(&mut pipe, &mut vec![0; 1024]).unwrap();
    pipe.room = 4 * PIECE;
    tls.send(&mut pipe, b"x", &mut Vec::new()).unwrap();
    let (opened, heard, _) = open(&mut theirs, &pipe.output);
    assert!(opened.is_ok(), "{opened:?}");
    assert_eq!(heard, [&reply[..], b"x"].concat());
}

#[test]
fn behind_its_last_word_a_client_says_nothing_and_does_not_travel() {
    let (mut tls, mut theirs) = session(0x1301, 0);
    let mut pipe = Pipe::with_room(0);
    theirs.seal(b"PING\r\n", &mut pipe.input).unwrap();
    theirs.seal_end(&mut pipe.input).unwrap();
    let rest = pipe.input.split_off(7);
    let mut buffer = vec![0; 1024];
    tls.read(&mut pipe, &mut buffer).unwrap();
    assert!(tls.has_partial() && tls.may_travel());
    pipe.input = rest;
    let got = tls.read(&mut pipe, &mut buffer).unwrap();
    assert_eq!((got.bytes, got.ended), (6, true));
    assert!(!tls.may_travel());
    pipe.input = b"more".to_vec();
    let got = tls.read(&mut pipe, &mut buffer).unwrap();
    assert_eq!((got.bytes, got.ended), (0, true));
    assert_eq!(pipe.input, b"more");
}

#[test]
fn no_secret_is_shown() {
    let (ours, _) = ends(0x1301, 0);
    let tls = Tls::of(Stage::Open(Box::new(ours)));
    let shown = format!("{tls:?} {tls:#?}");
    assert!(!shown.contains("1, 1, 1"), "{shown}");
    assert!(shown.contains("suite: 4865"), "{shown}");
    let told = format!("{:?}", tls.to_message());
    assert_eq!(told, "Some(Tls { suite: 4865, .. })");
}

#[test]
fn a_session_that_is_not_understood_is_not_taken() {
    let (ours, _) = ends(0x1301, 0);
    let told = Tls::of(Stage::Open(Box::new(ours))).to_message().unwrap();
    let with = |change: &dyn Fn(&mut slotmesh_proto::handover::v1::Tls)| {
        let mut told = told.clone();
        change(&mut told);
        Tls::read_message(Some(told), None).is_none()
    };
    assert!(!with(&|_| {}));
    assert!(with(&|told| told.suite = 0x1304));
    assert!(with(&|told| told.suite = 0x1_1301));
    assert!(with(&|told| told.rx_secret.truncate(31)));
    assert!(with(&|told| told.tx_secret.push(0)));
    assert!(with(&|told| told.input = vec![0; 17 * 1024]));
}
