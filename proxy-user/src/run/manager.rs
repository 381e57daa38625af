//! What systemd hears of the agent, where that is what started it.
//!
//! In: health. Out: the news that Services are in force, which is when a unit of the type `notify` has started; signs of life
//! for its watchdog, as long as no change is late; and the news that the agent ends. Started by anything else, the agent
//! has no socket to send this to.

use sd_notify::NotifyState;

use crate::observe::Health;

/// Tells for as long as the agent serves.
pub(super) async fn follow(health: Health) {
    let ready = async {
        health.serves().await;
        tell(&[NotifyState::Ready, NotifyState::Status("Services are in force")]);
    };
    tokio::join!(ready, live(&health));
}

/// Tells that the agent ends, and that nothing of what it programmed does.
pub(super) fn ending() {
    tell(&[NotifyState::Stopping, NotifyState::Status("what is programmed stays in the kernel")]);
}

/// Gives signs of life, also before Services are in force: the watchdog of an agent that has started anew in its own process
/// has been running on.
async fn live(health: &Health) {
    let Some(limit) = sd_notify::watchdog_enabled().filter(|limit| !limit.is_zero()) else { return };
    let mut signs = tokio::time::interval(limit / 2);
    signs.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        signs.tick().await;
        if health.healthy() {
            tell(&[NotifyState::Watchdog]);
        }
    }
}

fn tell(news: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(news) {
        tracing::warn!(%error, "systemd cannot be told how the agent is");
    }
}
