//! SORT over several shards: which patterns are refused, and which reach the node.

use super::world::{World, command};

fn reply(shards: usize, line: &str) -> String {
    let mut world = World::new(shards);
    let client = world.connect();
    world.send(client, &command(&line.split(' ').collect::<Vec<_>>()));
    world.settle();
    world.take_replies(client)
}

#[test]
fn a_pattern_that_may_form_keys_of_other_shards_is_refused() {
    for line in [
        "SORT k BY w_*",
        "SORT_RO k BY w_*->f",
        "SORT k BY w_* STORE {k}d",
        "SORT k BY {k}_* GET v_*",
        "SORT k GET # GET v_*",
    ] {
        let option = if line.contains("v_*") { "GET" } else { "BY" };
        let text = format!("-ERR {option} option of SORT denied in cluster mode.\r\n");
        assert_eq!(reply(3, line), text, "{line}");
    }
}

#[test]
fn other_patterns_reach_the_node() {
    // The small world's nodes do not know SORT, so that their answer tells that they were asked.
    let asked = |shards, line| reply(shards, line).starts_with("-ERR unknown command 'SORT'");
    assert!(asked(1, "SORT k BY w_* GET v_*"));
    assert!(asked(3, "SORT k BY nosort GET # LIMIT 0 1"));
    assert!(asked(3, "SORT k BY {k}w_* GET {k}v_*->f STORE {k}d"));
}
