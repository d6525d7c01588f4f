//! While an upgrade of the engine is under way, what the older engine does not know is answered as it
//! would answer, and reaches no node.

use slotmesh_command::{Product, Release};

use super::world::{World, command};

fn world(shards: usize, major: u32, minor: u32) -> World {
    let mut world = World::new(shards);
    world.set_settings(|settings| {
        settings.held_back = Some(Release::new(Product::Redis, major, minor, 15));
    });
    world
}

fn ask(world: &mut World, slot: u32, line: &str) -> String {
    let words: Vec<&str> = line.split(' ').collect();
    world.send(slot, &command(&words));
    world.settle();
    world.take_replies(slot)
}

const UNKNOWN: &str = "-ERR unknown command 'HTTL', with args beginning with: 'k' 'x' 'y' 'f' \r\n";

#[test]
fn a_newer_command_is_unknown_while_it_is_held_back_and_what_is_known_goes_on() {
    let mut world = world(2, 7, 0);
    let slot = world.connect();
    // Too few arguments are too few first, as without an upgrade.
    let few = ask(&mut world, slot, "HTTL k");
    assert!(few.contains("wrong number of arguments"), "{few}");
    assert_eq!(ask(&mut world, slot, "HTTL k x y f"), UNKNOWN);
    assert_eq!(ask(&mut world, slot, "SET k 1"), "+OK\r\n");
    assert_eq!(ask(&mut world, slot, "SPUBLISH c m"), ":0\r\n", "7.0's");
    assert_eq!(
        ask(&mut world, slot, "CLIENT NO-TOUCH on"),
        "+OK\r\n",
        "ours"
    );
    world.set_settings(|settings| settings.held_back = None);
    let passed = ask(&mut world, slot, "HTTL k x y f");
    assert_eq!(passed, "-ERR unknown command 'HTTL'\r\n", "a node's words");
}

#[test]
fn a_transaction_with_a_newer_command_is_aborted_as_with_an_unknown_one() {
    let mut world = world(1, 7, 0);
    let slot = world.connect();
    assert_eq!(ask(&mut world, slot, "MULTI"), "+OK\r\n");
    assert_eq!(ask(&mut world, slot, "SET k 1"), "+QUEUED\r\n");
    assert_eq!(ask(&mut world, slot, "HTTL k x y f"), UNKNOWN);
    let aborted = ask(&mut world, slot, "EXEC");
    assert!(aborted.starts_with("-EXECABORT"), "{aborted}");
    assert_eq!(ask(&mut world, slot, "GET k"), "$-1\r\n");
}

#[test]
fn redis_6_refuses_in_its_own_words() {
    let mut world = world(1, 6, 2);
    let slot = world.connect();
    assert_eq!(
        ask(&mut world, slot, "SPUBLISH c m"),
        "-ERR unknown command `SPUBLISH`, with args beginning with: `c`, `m`, \r\n"
    );
    let subcommand = ask(&mut world, slot, "command docs get");
    assert_eq!(
        subcommand,
        "-ERR Unknown subcommand or wrong number of arguments for 'docs'. Try COMMAND HELP.\r\n"
    );
}
