"""Tests of hookgraph; the folders mirror hookgraph/ one to one."""
