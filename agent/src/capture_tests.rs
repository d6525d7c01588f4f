//! Streams in pieces of every size, from a primary of a few lines.

use std::{os::unix::net::UnixListener, thread};

use super::*;

fn command(args: &[&str]) -> Vec<u8> {
    let args: Vec<&[u8]> = args.iter().map(|a| a.as_bytes()).collect();
    let mut frame = Vec::new();
    encode_command(&mut frame, &args);
    frame
}

/// Captures from a primary whose history is `history`, of which the first byte has offset 1 and the
/// oldest that it still has is `oldest`.
fn capture_of(history: &[u8], oldest: u64, from: u64, piece: usize) -> (Kept, Option<Vec<u8>>) {
    let dir = tempfile::tempdir().unwrap();
    let plan = Plan {
        socket: dir.path().join("sock"),
        user: "admin".into(),
        secret: "secret".into(),
        replid: "r0".into(),
        oldest,
        tail: Tail { from, known: true },
        until: history.len() as u64,
        database: 3,
        file: dir.path().join("lost.resp"),
    };
    let listener = UnixListener::bind(&plan.socket).unwrap();
    let stream = history[usize::try_from(oldest).unwrap() - 1..].to_vec();
    let primary = thread::spawn(move || {
        let (mut client, _) = listener.accept().unwrap();
        let mut asked = [0; 1024];
        for answer in ["+OK\r\n", "+CONTINUE\r\n"] {
            let _ = client.read(&mut asked).unwrap();
            client.write_all(answer.as_bytes()).unwrap();
        }
        for piece in stream.chunks(piece) {
            client.write_all(piece).unwrap();
        }
        // What comes after is not asked for.
        let _ = client.write_all(&command(&["PING"]));
    });
    let kept = capture(&plan).unwrap();
    primary.join().unwrap();
    (kept, fs::read(&plan.file).ok())
}

#[test]
fn the_file_is_what_follows_the_last_common_byte_for_the_right_database() {
    let common = [command(&["SELECT", "7"]), command(&["SET", "a", "1"])].concat();
    let tail = [
        command(&["MULTI"]),
        command(&["SET", "b", "2\r\n*1\r\n"]),
        command(&["EXEC"]),
        command(&["PING"]),
        command(&["SELECT", "12"]),
        command(&["DEL", "a"]),
    ]
    .concat();
    let from = common.len() as u64 + 1;
    for piece in [1, 2, 3, 7, 30, 1_000] {
        let (kept, file) = capture_of(&[common.clone(), tail.clone()].concat(), 1, from, piece);
        assert!(kept.complete, "{}", kept.why);
        assert_eq!(kept.commands, 2);
        let expected = [command(&["SELECT", "7"]), tail.clone()].concat();
        assert_eq!(file.unwrap(), expected, "in pieces of {piece}");
        assert_eq!(kept.sha256, hex::encode(Sha256::digest(&expected)));
    }
}

#[test]
fn with_no_change_of_database_in_the_backlog_it_is_the_one_that_has_keys() {
    let history = [command(&["SET", "a", "1"]), command(&["SET", "b", "2"])].concat();
    let (kept, file) = capture_of(&history, 1, history.len() as u64 / 2 + 1, 1_000);
    assert!(kept.complete);
    let expected = [command(&["SELECT", "3"]), command(&["SET", "b", "2"])].concat();
    assert_eq!(file.unwrap(), expected);
}

#[test]
fn a_tail_of_nothing_but_upkeep_leaves_no_file() {
    let history = [command(&["SET", "a", "1"]), command(&["PING"])].concat();
    let from = command(&["SET", "a", "1"]).len() as u64 + 1;
    let (kept, file) = capture_of(&history, 1, from, 1_000);
    assert!(kept.complete && kept.commands == 0);
    assert_eq!(file, None);
}

#[test]
fn of_an_overrun_backlog_what_follows_the_first_known_boundary_is_kept_and_called_incomplete() {
    let gone = command(&["SET", "a", "1"]);
    let rest = [
        command(&["SET", "b", "2"]),
        command(&["SELECT", "5"]),
        command(&["SET", "c", "3"]),
    ]
    .concat();
    // The oldest byte is within a command.
    let oldest = gone.len() as u64 + 5;
    for piece in [1, 1_000] {
        let history = [gone.clone(), rest.clone()].concat();
        let (kept, file) = capture_of(&history, oldest, 1, piece);
        assert!(!kept.complete && kept.why.contains("backlog"));
        assert_eq!(kept.commands, 1);
        let expected = [command(&["SELECT", "5"]), command(&["SET", "c", "3"])].concat();
        assert_eq!(file.unwrap(), expected);
    }
}

#[test]
fn a_name_leads_nowhere_else() {
    assert!(is_name("r-1-s-1-4-n_1.resp"));
    for bad in [
        "",
        ".resp",
        "../journal.resp",
        "a/b.resp",
        "journal",
        "a.resp\n",
        ".x.resp",
    ] {
        assert!(!is_name(bad), "{bad}");
    }
}
