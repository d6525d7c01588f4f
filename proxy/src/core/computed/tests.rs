//! What happens between the rounds of a command: answers are scripted here. What commands compute is
//! compared with an engine in the proxy's own tests.

use slotmesh_resp::{Args, Parsed, Protocol, RequestParser, write};

use super::super::job::{Ask, Job, Round, Step};
use super::super::spec::Request;
use crate::routing::{InstanceSettings, RoutingTable};

/// `a` is on shard 0 (slot 15495 is not), `b` on the other.
fn table() -> RoutingTable {
    let ranges = [(0, 8192, 16383), (1, 0, 8191)];
    RoutingTable::new(1, InstanceSettings::default(), Vec::new(), &ranges)
}

struct Play {
    job: Box<dyn Job>,
    table: RoutingTable,
    now_unix_us: u64,
}

/// The second of this moment is 1000.
const NOW_US: u64 = 1_000_000_000;

fn play(line: &str) -> Play {
    let words: Vec<&[u8]> = line.split(' ').map(str::as_bytes).collect();
    let mut frame = Vec::new();
    write::encode_command(&mut frame, &words);
    let mut args = Args::new();
    let parsed = RequestParser::new().parse(&frame, &mut args);
    assert!(matches!(parsed, Ok(Parsed::Complete { .. })));
    let request = Request {
        frame: &frame,
        args: &args,
    };
    let command = slotmesh_command::resolve(&request).unwrap();
    Play {
        job: super::begin(command, request, 16).unwrap(),
        table: table(),
        now_unix_us: NOW_US,
    }
}

impl Play {
    /// Answers the round before; what is asked or replied then must be this.
    #[track_caller]
    fn step(&mut self, answers: &[&str], want: &[&str]) {
        let mut round = Round {
            table: &self.table,
            db: 0,
            protocol: Protocol::Resp2,
            now_unix_us: self.now_unix_us,
            asks: Vec::new(),
            reply: Vec::new(),
        };
        let answers = answers.iter().map(|a| a.as_bytes().to_vec()).collect();
        let step = self.job.next(answers, &mut round);
        let got: Vec<String> = match step {
            Step::Done => vec![String::from_utf8_lossy(&round.reply).into_owned()],
            Step::Asked => round.asks.iter().map(asked).collect(),
        };
        assert_eq!(got, want);
    }
}

/// `shard> WORD word …`; of scripts only the arguments.
fn asked(ask: &Ask) -> String {
    let Ask::Shard { shard, frame, .. } = ask else {
        panic!("{ask:?}");
    };
    let (mut parser, mut args, mut at) = (RequestParser::new(), Args::new(), 0);
    let mut text = format!("{shard}>");
    while let Ok(Parsed::Complete { consumed }) = parser.parse(&frame[at..], &mut args) {
        for index in 0..args.len() {
            let word = args.get(&frame[at..], index).unwrap();
            if word.starts_with(b"\0") {
                text += " ?"; // a hidden key
            } else if !word.contains(&b'\n') {
                text += &format!(" {}", String::from_utf8_lossy(word));
            }
        }
        at += consumed;
    }
    text
}

const READ: [&str; 3] = ["0> PEXPIRETIME a", "0> DUMP a", "0> PEXPIRETIME a"];

#[test]
fn a_value_that_changed_while_it_was_moved_is_moved_anew() {
    let mut play = play("RENAME a b");
    play.step(&[], &READ);
    let restore = "1> RESTORE b 0 one ABSTTL REPLACE";
    play.step(&[":-1\r\n", "$3\r\none\r\n", ":-1\r\n"], &[restore]);
    play.step(&["+OK\r\n"], &["0> EVAL 2 a ? one -1"]);
    play.step(&[":0\r\n"], &READ);
    let restore = "1> RESTORE b 5 two ABSTTL REPLACE";
    play.step(&[":5\r\n", "$3\r\ntwo\r\n", ":5\r\n"], &[restore]);
    play.step(&["+OK\r\n"], &["0> EVAL 2 a ? two 5"]);
    play.step(&[":1\r\n"], &["+OK\r\n"]);
}

#[test]
fn a_value_whose_time_to_live_changed_is_read_again() {
    let mut play = play("COPY a b");
    play.step(&[], &READ);
    play.step(&[":-1\r\n", "$3\r\none\r\n", ":5\r\n"], &READ);
    let restore = "1> RESTORE b 5 one ABSTTL";
    play.step(&[":5\r\n", "$3\r\none\r\n", ":5\r\n"], &[restore]);
    play.step(&["+OK\r\n"], &[":1\r\n"]);
}

#[test]
fn a_key_that_always_changes_is_given_up_with_its_state_told() {
    let mut play = play("RENAMENX a b");
    play.step(&[], &READ);
    for attempt in 1..=8 {
        let restore = if attempt == 1 {
            "1> RESTORE b 0 one ABSTTL"
        } else {
            "1> RESTORE b 0 one ABSTTL REPLACE" // what stands there is ours
        };
        play.step(&[":-1\r\n", "$3\r\none\r\n", ":-1\r\n"], &[restore]);
        play.step(&["+OK\r\n"], &["0> EVAL 2 a ? one -1"]);
        if attempt < 8 {
            play.step(&[":0\r\n"], &READ);
        }
    }
    let error = "-ERR slotmesh: the key kept changing while it was moved to another shard; it \
                 still has its old name, and an earlier value of it stands under the new one\r\n";
    play.step(&[":0\r\n"], &[error]);
}

#[test]
fn a_destination_that_exists_is_not_replaced() {
    for line in ["RENAMENX a b", "COPY a b"] {
        let mut play = play(line);
        play.step(&[], &READ);
        let restore = "1> RESTORE b 0 one ABSTTL";
        play.step(&[":-1\r\n", "$3\r\none\r\n", ":-1\r\n"], &[restore]);
        play.step(
            &["-BUSYKEY Target key name already exists.\r\n"],
            &[":0\r\n"],
        );
    }
}

#[test]
fn a_source_that_goes_away_is_no_loss() {
    let after_copy = |expiry: &str| {
        let mut play = play("RENAME a b");
        play.step(&[], &READ);
        let restore = format!("1> RESTORE b {expiry} one ABSTTL REPLACE");
        let expiry = format!(":{expiry}\r\n");
        play.step(&[&expiry, "$3\r\none\r\n", &expiry], &[&restore]);
        play.step(
            &["+OK\r\n"],
            &[&format!("0> EVAL 2 a ? one {}", expiry[1..].trim())],
        );
        play
    };
    let mut play = after_copy("1000000");
    play.step(&[":-1\r\n"], &["+OK\r\n"]); // it expired at this very moment
    let error = "-ERR slotmesh: another client removed the key while it was moved to another \
                 shard; the value that it had stands under the new name\r\n";
    after_copy("1000001").step(&[":-1\r\n"], &[error]);
}

#[test]
fn an_engine_that_cannot_say_when_a_key_expires_says_in_how_long() {
    let mut play = play("RENAME a b");
    play.step(&[], &READ);
    let unknown = "-ERR unknown command `PEXPIRETIME`, with args beginning with: `a`, \r\n";
    let again = ["0> PTTL a", "0> DUMP a", "0> PTTL a"];
    play.step(&[unknown, "$3\r\none\r\n", unknown], &again);
    let restore = "1> RESTORE b 1000019 one ABSTTL REPLACE";
    play.step(&[":20\r\n", "$3\r\none\r\n", ":19\r\n"], &[restore]);
    play.step(&["+OK\r\n"], &["0> EVAL 2 a ? one "]);
    play.step(&[":1\r\n"], &["+OK\r\n"]);
}

#[test]
fn a_refused_block_is_answered_with_its_reason() {
    let oom = "-OOM command not allowed when used memory > 'maxmemory'.\r\n";
    let aborted = "-EXECABORT Transaction discarded because of previous errors.\r\n";
    for (reason, reply) in [
        (oom, oom),
        (":0\r\n", aborted),
        ("-WRONGTYPE x\r\n", aborted),
    ] {
        let mut sets = play("SUNIONSTORE b a b");
        sets.step(&[], &["0> SUNION a", "1> SUNION b"]);
        let block = "1> MULTI DEL b SADD b x EXEC";
        sets.step(&["*1\r\n$1\r\nx\r\n", "*0\r\n"], &[block]);
        sets.step(&[aborted], &["1> SETRANGE b 0 "]);
        sets.step(&[reason], &[reply]);
    }
}

#[test]
fn a_member_that_another_client_took_first_stays_at_its_new_place() {
    let mut play = play("SMOVE a b m");
    play.step(&[], &["0> EXISTS a", "0> SISMEMBER a m", "1> TYPE b"]);
    play.step(&[":1\r\n", ":1\r\n", "+none\r\n"], &["1> SADD b m"]);
    play.step(&[":1\r\n"], &["0> SREM a m"]);
    play.step(&[":0\r\n"], &[":0\r\n"]);
}

#[test]
fn numbers_that_engines_show_in_different_ways_are_shown_by_the_node() {
    let mut play = play("ZUNION 2 a b WITHSCORES");
    let ranges = ["0> ZRANGE a 0 -1 WITHSCORES", "0> SMEMBERS a"];
    let others = ["1> ZRANGE b 0 -1 WITHSCORES", "1> SMEMBERS b"];
    play.step(&[], &[ranges, others].concat());
    let wrong = "-WRONGTYPE x\r\n";
    let a = "*4\r\n$1\r\nm\r\n$3\r\n0.1\r\n$1\r\nn\r\n$3\r\n0.7\r\n";
    let b = "*2\r\n$1\r\nm\r\n$3\r\n0.2\r\n";
    // The sum is a new number, 0.7 came from the node.
    let script = "0> EVAL local t = {} for i = 1, #ARGV do t[i] = {double = tonumber(ARGV[i])} end \
                  return t 0 0.30000000000000004";
    play.step(&[a, wrong, b, wrong], &[script]);
    let reply = "*4\r\n$1\r\nm\r\n$4\r\n0.30\r\n$1\r\nn\r\n$3\r\n0.7\r\n";
    play.step(&["*1\r\n$4\r\n0.30\r\n"], &[reply]);
}

#[test]
fn an_error_of_the_last_step_tells_what_the_first_ones_did() {
    let lost = "-ERR slotmesh: the outcome is unknown\r\n";
    let mut rename = play("RENAME a b");
    rename.step(&[], &READ);
    let restore = "1> RESTORE b 0 one ABSTTL REPLACE";
    rename.step(&[":-1\r\n", "$3\r\none\r\n", ":-1\r\n"], &[restore]);
    rename.step(&["+OK\r\n"], &["0> EVAL 2 a ? one -1"]);
    let error = "-ERR slotmesh: the value stands under its new name, and may still stand under its \
                 old one: ERR slotmesh: the outcome is unknown\r\n";
    rename.step(&[lost], &[error]);
    let mut smove = play("SMOVE a b m");
    smove.step(&[], &["0> EXISTS a", "0> SISMEMBER a m", "1> TYPE b"]);
    smove.step(&[":1\r\n", ":1\r\n", "+set\r\n"], &["1> SADD b m"]);
    smove.step(&[":0\r\n"], &["0> SREM a m"]);
    let error = "-ERR slotmesh: the member is in the destination, and may still be in the source: \
                 ERR slotmesh: the outcome is unknown\r\n";
    smove.step(&[lost], &[error]);
}
