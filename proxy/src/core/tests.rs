//! The core as a whole: bytes in, bytes out, in the small world of [`world`].

mod departing;
mod endurance;
mod held_back;
mod losses;
mod order;
mod scenarios;
mod sorting;
mod world;
