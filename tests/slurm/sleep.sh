#!/usr/bin/env bash
# A job that only takes room.
sleep 1
