//! Nodes that hang, peers that don't read, routes that go and come: everything ends, within bounds.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use slotmesh_acl::Users;

use super::world::{World, command};
use crate::core::client::ClientState;
use crate::core::lane::SILENCE_LIMIT_US;
use crate::core::sessions::{BACKLOG_CLOSE_BYTES, BACKLOG_PAUSE_BYTES, NoOutlet, Sessions};
use crate::core::{Core, Identity};
use crate::routing::{InstanceSettings, RoutingTable};

fn check(world: &mut World, client: u32, want: &str) {
    let replies = world.take_replies(client);
    assert!(replies.starts_with(want), "{replies:?}, wanted {want:?}");
}

#[test]
fn a_node_that_says_nothing_is_given_up_and_only_its_own_requests_fail() {
    let mut world = World::new(2);
    world.settle();
    let [a, b] = [world.connect(), world.connect()];
    world.nodes[1]
        .data
        .insert((0, b"b".to_vec()), b"1".to_vec()); // slot 3300: shard 0
    world.send(a, &command(&["INCR", "a"])); // slot 15495: shard 1
    world.obey();
    let lanes = world.lanes();
    world.pass(SILENCE_LIMIT_US / 2);
    world.send(a, &command(&["GET", "a"]));
    world.send(b, &command(&["INCR", "b"]));
    world.obey();
    world.run_node(lanes[0], 9);
    world.deliver(lanes[0], usize::MAX);
    check(&mut world, b, ":1\r\n");
    check(&mut world, a, "");
    world.pass(SILENCE_LIMIT_US / 2 - 10);
    assert_eq!(world.core.counters.outcome_unknown, 0);
    world.pass(10);
    check(
        &mut world,
        a,
        "-ERR slotmesh: connection to the shard's primary was lost",
    );
    // The read waits for the next connection; that one hangs in the login.
    world.pass(300_000);
    check(&mut world, a, "");
    world.pass(InstanceSettings::default().hold_budget_us);
    check(
        &mut world,
        a,
        "-ERR slotmesh: the shard's primary could not be reached in time",
    );
    // It goes on: so does the shard, whatever of its old connection comes to life.
    world.pass(SILENCE_LIMIT_US);
    world.pass(300_000);
    world.settle();
    world.send(a, &command(&["GET", "a"]));
    world.settle();
    check(&mut world, a, "$-1\r\n");
    // Silence without a request is none.
    let losses = world.core.counters.node_losses;
    for _ in 0..30 {
        world.pass(2 * SILENCE_LIMIT_US / 10);
        world.settle(); // it answers whether it is there
    }
    assert_eq!(world.core.counters.node_losses, losses);
}

#[test]
fn a_shard_that_comes_back_as_it_was_is_served_again() {
    let mut world = World::new(2);
    world.settle();
    let client = world.connect();
    world.send(client, &command(&["SET", "a", "1"]));
    world.settle();
    check(&mut world, client, "+OK\r\n");
    world.send(client, &command(&["SET", "a", "2"]));
    world.remove(1, true);
    check(&mut world, client, "-ERR slotmesh: ");
    world.remove(1, false);
    world.send(client, &command(&["GET", "a"]));
    world.settle();
    check(&mut world, client, "$1\r\n1\r\n");
}

#[test]
fn room_that_another_worker_made_is_found_without_being_told() {
    let mut world = World::new(1);
    let client = world.connect();
    let bound = InstanceSettings::default().hold_bytes_max;
    world.held_sum.store(bound + 1, Ordering::Relaxed);
    world.core.on_time();
    world.send(client, &command(&["GET", "a"]));
    assert!(
        world.core.out.unsteady,
        "the worker asks for the next deadline"
    );
    for _ in 0..10 {
        let next = world.core.on_time().unwrap();
        assert!(next > world.now_us, "no busy waiting");
        assert!(next <= world.now_us + 10_000, "{next}");
        world.pass(next - world.now_us);
    }
    world.held_sum.store(0, Ordering::Relaxed);
    world.pass(10_000);
    world.settle();
    check(&mut world, client, "$-1\r\n");
}

#[test]
fn a_client_that_came_before_the_topology_must_log_in_like_any_other() {
    let identity = Identity {
        run_id: "r".to_owned(),
        port: 1,
        pid: 1,
        advertise: None,
    };
    let mut core = Core::new(Arc::new(identity), Arc::new(AtomicU64::new(0)));
    let slot = core.open_client(ClientState::new(1, None, 0));
    let ask = |core: &mut Core, words: &[&str]| {
        let bytes = command(words);
        assert_eq!(core.client_bytes(slot, &bytes), bytes.len());
        let output = &mut core.sessions.get_mut(slot).unwrap().state.output;
        String::from_utf8(std::mem::take(output)).unwrap()
    };
    for words in [
        &["PING"][..],
        &["AUTH", "default", "x"],
        &["AUTH", "x"],
        &["HELLO", "3"],
        &["HELLO", "3", "AUTH", "default", "x"],
        &["RESET"],
        &["GET", "a"],
    ] {
        let reply = ask(&mut core, words);
        let reset = words == ["RESET"];
        assert!(reset || reply.starts_with("-LOADING slotmesh"), "{reply}");
        assert!(!core.sessions.get(slot).unwrap().state.authenticated);
    }
    let put = |core: &mut Core, password_sha256| {
        let settings = InstanceSettings {
            users: Arc::new(Users::open(password_sha256)),
            ..InstanceSettings::default()
        };
        core.apply(Arc::new(RoutingTable::new(1, settings, Vec::new(), &[])));
    };
    put(&mut core, Some([0; 32]));
    assert!(ask(&mut core, &["PING"]).starts_with("-NOAUTH"));
    put(&mut core, None);
    assert_eq!(ask(&mut core, &["PING"]), "+PONG\r\n");
}

#[test]
fn a_script_without_keys_joins_the_shard_of_its_transaction() {
    let mut world = World::new(3);
    world.settle();
    let client = world.connect();
    for words in [
        &["MULTI"][..],
        &["SET", "a", "1"], // not the shard of commands without a key
        &["EVAL", "return 1", "0"],
        &["DISCARD"],
    ] {
        world.send(client, &command(words));
    }
    check(&mut world, client, "+OK\r\n+QUEUED\r\n+QUEUED\r\n+OK\r\n");
}

#[test]
fn a_leaving_client_that_does_not_read_is_closed_at_the_bound_too() {
    let mut sessions = Sessions::default();
    let slot = sessions.open(ClientState::new(1, None, 0));
    let client = sessions.get_mut(slot).unwrap();
    let (generation, count) = (client.generation, 5);
    (0..count).for_each(|_| _ = client.ticket());
    sessions.leave(slot);
    let reply = vec![b'x'; BACKLOG_CLOSE_BYTES / 3];
    for seq in 0..count - 1 {
        assert!(seq > 2 || sessions.doomed.is_empty());
        sessions.deliver(slot, generation, seq, &reply, &mut NoOutlet);
    }
    assert!(!sessions.doomed.is_empty());
}

#[test]
fn what_a_slow_reader_takes_is_freed_in_large_pieces() {
    let mut sessions = Sessions::default();
    let slot = sessions.open(ClientState::new(1, None, 0));
    let client = sessions.get_mut(slot).unwrap();
    let generation = client.generation;
    client.ticket();
    let len = 64 * BACKLOG_PAUSE_BYTES;
    sessions.deliver(slot, generation, 0, &vec![b'x'; len], &mut NoOutlet);
    let (mut moved, mut kept) = (0, len);
    while sessions.get(slot).unwrap().unsent() > 0 {
        sessions.mark_sent(slot, BACKLOG_PAUSE_BYTES / 4);
        let now = sessions.get(slot).unwrap().state.output.len();
        moved += if now < kept { now } else { 0 };
        kept = now;
    }
    assert!(moved <= len, "moved {moved} bytes to send {len}");
}
